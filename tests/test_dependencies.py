"""The library on its own needs torch, numpy, safetensors and pydantic; the zoo and the recipes what is declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "numpy", "safetensors", "pydantic")

USE = """
import bayeslayers as bl

torch.manual_seed(0)
net = nn.Sequential(bl.BayesLinear(2, 8), nn.ReLU(), bl.BayesLinear(8, 3))
x, y = torch.randn(12, 2), torch.arange(12) % 3
optimizer = bl.VOGN(net, dataset_size=12, lr=0.1)

def closure():
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss

before = net[0].weight_precision.clone()
optimizer.step(closure)
assert not torch.equal(before, net[0].weight_precision)
prediction = bl.predict(net, x, num_samples=4)
evaluation = bl.evaluate(net, (x, y), num_samples=4)
assert 0 <= evaluation.metrics["accuracy"] <= 1
bl.save_posterior(net, sys.argv[1], name="lean", dataset="points (12 train)", metrics={"accuracy": 0.5})
other = nn.Sequential(bl.BayesLinear(2, 8), nn.ReLU(), bl.BayesLinear(8, 3))
bl.load_posterior(sys.argv[1], other)
assert torch.equal(other[0].weight_precision, net[0].weight_precision)
"""

BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from torch import nn
"""


def required(names):
    """Return the distributions that these need, themselves among them."""
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


def modules_of_others(names):
    """Return the top-level modules of installed distributions that these distributions do not need."""
    kept = required(names)
    others = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & kept
    }
    return others - sys.stdlib_module_names - {"bayeslayers", "zoo", "recipes"}


def test_the_library_works_where_only_its_four_packages_are_installed(tmp_path):
    blocked = modules_of_others(NEEDED) | {"zoo", "recipes"}
    assert {"rich", "PIL", "yaml", "huggingface_hub", "torchvision", "timm", "matplotlib", "sklearn"} <= blocked
    code = f"blocked = {blocked!r}\n{BLOCK}\n{USE}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p/README.md").is_file()


def test_the_demo_works_where_only_declared_packages_are_installed(tmp_path):
    always, _ = declared()
    blocked = modules_of_others(re.findall(r'"([\w.-]+)>=', "\n".join(always)))
    assert {"sklearn", "tensorboard", "torchmetrics", "pandas", "onnx", "mpi4py"} & set(
        blocked
    ) and "rich" not in blocked
    run = "from recipes.cli import main\nsys.exit(main(['demo', '--num-samples', '2', '--output', sys.argv[1]]))"
    code, picture = f"blocked = {blocked!r}\n{BLOCK}\n{run}", tmp_path / "demo.png"
    done = subprocess.run([sys.executable, "-c", code, str(picture)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "lenet5-mnist" in done.stdout and picture.stat().st_size > 20_000


def test_a_blocked_package_is_missed():
    code = f"blocked = {{'rich'}}\n{BLOCK}\nimport bayeslayers as bl\nprint(bl.evaluate(bl.BayesLinear(1, 2), "
    code += "(torch.ones(2, 1), torch.tensor([0, 1])), num_samples=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "No module named 'rich" in done.stderr


def declared():
    """Return the lines of pyproject.toml that declare what every user gets, and those of the extras for users."""
    text = (ROOT / "pyproject.toml").read_text().partition("dependencies = [\n")[2].partition("\ntest = [")[0]
    always, _, extras = text.partition("\n]")
    return [line.strip() for line in always.splitlines()], extras.splitlines()


def modules(lines):
    """Return the top-level modules of the distributions that lines declare."""
    names = re.findall(r'"([\w.-]+)>=', "\n".join(lines))
    other = {
        "bayesian-torch": "bayesian_torch",
        "blitz-bayesian-pytorch": "blitz",
        "torch-uncertainty": "torch_uncertainty",
    }
    other |= {"pillow": "PIL", "pyyaml": "yaml", "segmentation-models-pytorch": "segmentation_models_pytorch"}
    return {other.get(name, name) for name in names}


def imported(package):
    """Yield each file of a package with the top-level module of each of its imports."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((path, name.partition(".")[0]) for name in names)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    always, extras = declared()
    own = {"bayeslayers", "zoo", "recipes", "triton"}  # Triton comes with torch where there is any
    known = modules(always) | modules(extras) | own | sys.stdlib_module_names
    found = [pair for package in ("bayeslayers", "zoo", "recipes") for pair in imported(package)]
    assert len(found) > 500
    assert [(str(path), module) for path, module in found if module not in known] == []
    assert modules(always) <= {module for _, module in found}


def test_every_dependency_has_its_reason_beside_it():
    always, extras = declared()
    packages = [line for line in always + extras if ">=" in line]
    assert len(packages) > 12 and [line for line in packages if "  # " not in line] == []
