"""Sphinx configuration: Markdown pages, and the reference from the docstrings."""

project = "bayeslayers"
author = "the bayeslayers developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "literal"  # docstrings use single backticks for code
napoleon_use_ivar = True  # a field of a named tuple is described once: in the docstring of its class
