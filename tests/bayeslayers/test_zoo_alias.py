from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bayeslayers as bl

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "code",
    [
        "import bayeslayers.zoo, zoo; assert bayeslayers.zoo is zoo",
        "import zoo, bayeslayers.zoo; assert bayeslayers.zoo is zoo",
        "from bayeslayers.zoo import load; import zoo; assert load is zoo.load",
        "from bayeslayers import zoo as one; import zoo; assert one is zoo",
        "import bayeslayers as bl; assert bl.zoo.load is bl.zoo.load; import zoo; assert bl.zoo is zoo",
        "import bayeslayers, sys; assert 'zoo' not in sys.modules; bayeslayers.zoo; assert 'zoo' in sys.modules",
    ],
)
def test_the_zoo_has_two_names(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_another_package_of_that_name_is_told_apart(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/__init__.py").write_text("__version__ = '0.11'\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bayeslayers as bl; bl.zoo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.rstrip().splitlines()[-1].startswith("ImportError: zoo must be the package that bayeslayers")


def test_other_attributes_are_still_missing():
    with pytest.raises(AttributeError, match="module 'bayeslayers' has no attribute 'zo'"):
        _ = bl.zo
