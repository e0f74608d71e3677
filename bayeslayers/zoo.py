"""The zoo by the library's own name: `bayeslayers.zoo` is the module `zoo`, for environments with another `zoo`."""

import sys

import zoo
from zoo import *  # noqa: F403  what type checkers see here

if not hasattr(zoo, "list_posteriors"):
    raise ImportError(
        f"zoo must be the package that bayeslayers installs, got {zoo.__file__}. Another package hides it: "
        "put bayeslayers first on the path, or uninstall the other."
    )
sys.modules[__name__] = zoo
