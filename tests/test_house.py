"""The rules of the house that code alone can check: who imports whom, and what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module of bayeslayers imports only those above it. A new one takes its place here.
ORDER = """
    checks unwrap outputs display gaussian noise curvature matrix_gaussian perturbation layers sampling convert
    likelihoods card method export merge weights claims checkpoint optim batches prediction laplace metrics recalibrate
    evaluate plots
""".split()
HEAVY = {
    "timm",
    "segmentation_models_pytorch",
    "matplotlib",
    "torchvision",
    "torchmetrics",
    "huggingface_hub",
    "tensorboard",
    "rich",
    "yaml",
    "PIL",
    "zoo",
    "recipes",
}


def sources(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def imports(path):
    """Yield the dotted names that a file imports, at any depth, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def of_package(package):
    return pytest.mark.parametrize("path", sources(package), ids=lambda path: str(path.relative_to(ROOT)))


@of_package("bayeslayers")
def test_the_library_imports_downwards_alone(path):
    names = list(imports(path))
    assert not [name for name in names if name.split(".")[0] in ("zoo", "recipes")]
    own = path.relative_to(ROOT / "bayeslayers").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in ORDER, f"give {own} its place in ORDER"
    for name in names:
        package, *rest = name.split(".")
        if package == "bayeslayers":
            assert ORDER.index(rest[0]) <= ORDER.index(own), f"{own} imports {rest[0]}, which stands below it"


@of_package("zoo")
def test_the_zoo_imports_no_recipes(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "recipes"]


@of_package("bayeslayers")
def test_the_library_leaves_the_global_seed_alone(path):
    assert not {"torch.manual_seed", "torch.seed", "np.random.seed", "random.seed"} & set(calls(path))


@pytest.mark.parametrize("package", ["bayeslayers", "zoo", "recipes"])
def test_nothing_is_unpickled_and_no_text_is_run(package):
    for path in sources(package):
        assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
            name.split(".")[0] for name in imports(path)
        }, path
        forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.hub.load", "yaml.load"}
        assert not forbidden & set(calls(path)), path


def test_the_checks_of_this_file_see_what_they_look_for(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\ndef f():\n    from zoo.mlp import mlp\n    torch.load(x)\n    eval('1')\n    net.eval()\n"
    )
    assert list(imports(path)) == ["pickle", "zoo.mlp.mlp"]
    assert sorted(calls(path)) == ["eval", "net.eval", "torch.load"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("bayeslayers", HEAVY), ("zoo", HEAVY - {"zoo"}), ("recipes.cli", HEAVY - {"recipes"} | {"torch", "numpy"})],
)
def test_an_import_stays_light(module, unwanted):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not unwanted & set(done.stdout.split())


def test_every_module_of_tests_has_a_room_and_no_machine_path():
    assert not list(ROOT.glob("*/utils.py"))
    for path in (*sources("bayeslayers"), *sources("zoo"), *sources("recipes"), *sources("tests")):
        text = path.read_text()
        assert not [word for word in ("/" + "tmp/", "/" + "work/", "/" + "home/", "/" + "root/") if word in text], path
