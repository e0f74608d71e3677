"""The rules of the house that code alone can check: who imports whom, and what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room imports only those above it in its package. A new one takes its place here.
ORDER = {
    "bayeslayers": """
        checks files dtypes readings unwrap inputs outputs display batches distributed distributions likelihoods
        curvature corruptions layers sampling convert storage method optim prediction laplace merge export continual
        metrics recalibrate conformal evaluate diagnosis plots
    """.split(),
    "zoo": """
        images permutations normalise encoder_weights backbones registry cost networks transforms untrusted hub loading
    """.split(),
    "recipes": "data image_files training reports tasks cli".split(),
}
# Modules of more than 300 lines, each with the reason why it is one concept.
LONG = {
    "recipes/tasks/toy2d.py": "one task, whole in one file",
}
ALIAS = ROOT / "bayeslayers/zoo.py"  # the one exception: another name of the zoo, which nothing imports by itself
ALLOWED = {"bayeslayers": (), "zoo": ("bayeslayers",), "recipes": ("bayeslayers", "zoo")}
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


@pytest.mark.parametrize(
    ("package", "path"), [(package, path) for package in ORDER for path in sources(package) if path != ALIAS]
)
def test_every_room_imports_downwards_alone(package, path):
    rooms, names = ORDER[package], list(imports(path))
    assert {name.split(".")[0] for name in names} & set(ORDER) <= {package, *ALLOWED[package]}
    own = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in rooms, f"give {own} its place in ORDER"
    for name in names:
        top, *rest = name.split(".")
        if top == package and rest[0] in rooms:
            assert rooms.index(rest[0]) <= rooms.index(own), f"{own} imports {rest[0]}, which stands below it"


def test_no_modules_import_each_other_in_a_circle():
    paths = [path for package in ORDER for path in sources(package) if path != ALIAS]
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}

    def module_of(name):
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        return name

    needs = {module: {module_of(name) for name in imports(path)} - {module} for module, path in known.items()}
    while leaves := [module for module, needed in needs.items() if not needed & needs.keys()]:
        for leaf in leaves:
            del needs[leaf]
    assert not needs


@pytest.mark.parametrize("package", ORDER)
def test_no_module_is_long_without_a_reason(package):
    for path in sources(package):
        if len(path.read_text().splitlines()) > 300:
            name = str(path.relative_to(ROOT))
            assert name in LONG, f"{name} has more than 300 lines: split it, or say in LONG why it is one concept"
    assert all(len(reason) > 20 and (ROOT / name).is_file() for name, reason in LONG.items())


def test_the_tests_mirror_the_rooms():
    for path in (ROOT / "tests").rglob("test_*.py"):
        room = path.relative_to(ROOT / "tests").parent
        assert (ROOT / room).is_dir(), f"{path} lies in a folder that mirrors no room"


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


def test_the_words_are_those_of_the_field():
    """A newcomer looks for OOD, baseline and metric: each thing has one word, that of the field."""
    words = "stra" + r"nger|\bt" + r"wins?\b|by h" + r"eart|\bdo" + r"ubts?\b|\ban" + "ew" + r"\b|which is n" + r"one\b"
    found = subprocess.run(
        ["git", "grep", "-nIiP", words, "--", ".", ":!CHANGELOG.md", ":!tests/support/old_posterior"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if found.returncode == 128:
        pytest.skip("not in a git checkout")
    assert not found.stdout
