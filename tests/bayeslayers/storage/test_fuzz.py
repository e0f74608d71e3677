"""A posterior's folder, changed in thousands of ways: it loads, or PosteriorError says in a line what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.mutations import CONFIG, KINDS, WEIGHTS, Files
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from zoo.loading import download
from zoo.untrusted import _CallLimit

MUTATIONS = 2100


def listing(folder: Path):
    """What lies where, with its size and the time of its last change."""
    return {
        (str(path.relative_to(folder)), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
    }


def fresh(folder: Path) -> Path:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


@pytest.fixture
def valid(tmp_path):
    torch.manual_seed(0)
    model = zoo.create("mlp", widths=[3], input_size=[1, 2, 2], num_classes=2)
    bl.save_posterior(model, tmp_path / "outside", class_names=["a", "b"], dataset="d", metrics={"accuracy": 0.5})
    return tmp_path / "outside"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_every_mutation_loads_or_is_refused_in_a_sentence(valid, tmp_path, monkeypatch, capsys):
    folder, sandbox = tmp_path / "folder", tmp_path / "sandbox"
    for path in (folder, sandbox):
        path.mkdir()
    monkeypatch.chdir(sandbox)
    reference, outcomes, slowest = zoo.load(valid).state_dict(), Counter(), 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(MUTATIONS):
        kind = KINDS[seed % len(KINDS)]
        files = Files(valid)
        kind(random.Random(seed), files, fresh(folder))
        for name, content in files.raw.items():
            (folder / name).write_bytes(content)
        before, start = listing(tmp_path), time.perf_counter()
        try:
            model = zoo.load(folder)
        except bl.PosteriorError as error:
            text = str(error)
            assert text.isprintable() and 20 < len(text) < 700, (kind, seed, text)
            assert str(folder) in text, (kind, seed, text)
            outcomes[kind.__name__, "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        else:  # what loads is whole, finite and positive
            assert model.state_dict().keys() == reference.keys(), (kind, seed)
            for name, tensor in load_file(folder / WEIGHTS).items():
                assert_close(model.state_dict()[name], tensor.float(), rtol=0, atol=0)
                assert tensor.isfinite().all() and ("precision" not in name or (tensor > 0).all()), (kind, seed)
            bl.predict(model, torch.zeros(1, 1, 2, 2), 1)
            outcomes[kind.__name__, "loaded"] += 1
        with contextlib.suppress(bl.PosteriorError):
            download(folder)  # which checks the files alone
        slowest = max(slowest, time.perf_counter() - start)
        assert listing(tmp_path) == before, (kind, seed)
        assert torch.is_grad_enabled() and torch.get_default_device().type == "cpu", (kind, seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / (1024 if sys.platform == "linux" else 2**20)
    with capsys.disabled():
        print(f"\n{sum(outcomes.values())} mutations, slowest {slowest:.2f} s, memory grew by {grown:.0f} MB")
        for kind in KINDS:
            loaded, refused = outcomes[kind.__name__, "loaded"], outcomes[kind.__name__, "refused"]
            print(f"  {kind.__name__}: {loaded} loaded, {refused} refused")
    assert sum(outcomes.values()) == MUTATIONS
    assert grown < 300
    for kind in KINDS:
        assert outcomes[kind.__name__, "refused"] >= 10


@pytest.mark.parametrize(
    ("builder", "kwargs", "message"),
    [
        ("mlp", {"widths": [100_000] * 4}, "must hold tensor 'hidden2.bias', got none"),  # 150 GB, were it built
        ("mlp", {"widths": [1] * 300_000}, "it is far larger than its weights"),
        ("mlp", {"widths": [10**9]}, "its number 1000000000 is too large"),
        ("mlp", {"num_classes": 10**400}, "its number 10000.* is too large"),
        ("resnet110", {}, r"must hold tensor 'bn1.bias', got none of that name \(1643 missing\)"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "must get no argument 'weights'"),
        ("torchvision:resnet18", {"pretrained": True}, "must not have the argument 'pretrained'"),
    ],
)
def test_a_card_of_a_few_bytes_cannot_ask_for_a_huge_network(valid, builder, kwargs, message):
    card = json.loads((valid / CONFIG).read_text()) | {"builder": builder, "kwargs": kwargs}
    size = [3, 224, 224] if ":" in builder else [3, 32, 32] if builder == "resnet110" else [1, 28, 28]
    (valid / CONFIG).write_text(json.dumps(card | {"input_size": size}))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(bl.PosteriorError, match=message):
        zoo.load(valid)
    assert torch.is_grad_enabled() and torch.get_default_device().type == "cpu"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / (1024 if sys.platform == "linux" else 2**20)
    assert grown < 300


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_may_not_leave_its_folder(valid, tmp_path, name):
    shutil.copytree(valid, tmp_path / "folder")
    link = tmp_path / "folder" / name
    for target in (valid / name, Path("../outside") / name):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(bl.PosteriorError, match=f"{name} must be a file of its folder, got a link out of it"):
            zoo.load(tmp_path / "folder")
    link.unlink()
    shutil.copy(valid / name, tmp_path / "folder/blob")
    link.symlink_to("blob")
    zoo.load(tmp_path / "folder")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")  # the folder itself may be anywhere
    zoo.load(tmp_path / "linked")


@pytest.mark.parametrize("blobs", ["blobs", "../blobs", "elsewhere"])
def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(valid, tmp_path, blobs):
    repository = tmp_path / "models--ada--x"
    snapshot = repository / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir() if blobs == "blobs" else (repository / "blobs").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        for place in (repository / "blobs", tmp_path / "blobs"):
            shutil.copy(valid / name, place / name)
        (snapshot / name).symlink_to(f"../../{'blobs' if blobs == 'elsewhere' else blobs}/{name}")
    if blobs == "blobs":
        zoo.load(snapshot)
    else:
        with pytest.raises(bl.PosteriorError, match="got a link out of it"):
            zoo.load(snapshot)


def test_the_card_and_the_header_have_limits(valid):
    text = (valid / CONFIG).read_text()
    (valid / CONFIG).write_text(text + " " * 2**23)
    with pytest.raises(bl.PosteriorError, match=r"config.json must have at most 4194304 bytes, got 838\d{4}"):
        zoo.load(valid)
    weights = struct.pack("<Q", 2**23) + b" " * 2**23
    (valid / WEIGHTS).write_bytes(weights)
    (valid / CONFIG).write_text(json.dumps(json.loads(text) | {"sha256": hashlib.sha256(weights).hexdigest()}))
    with pytest.raises(bl.PosteriorError, match="with a header of at most 4194304 bytes"):
        zoo.load(valid)


@pytest.mark.parametrize("calls", range(60))
def test_a_network_refused_at_any_point_leaves_no_trace(calls):
    with pytest.raises(ValueError, match="far larger"), torch.device("meta"), _CallLimit(calls, {}):
        zoo.create("lenet5_bn")
    assert torch.is_grad_enabled() and torch.get_default_device().type == "cpu"
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("builder", "kwargs", "size", "message"),
    [
        ("resnet20", {}, [3, 8000, 8000], "'input_size': must be integers >= 1 whose product is at most 33554432"),
        ("unet_small", {"width": 64}, [3, 2400, 2400], "one example takes a tensor of 368640000 numbers, more than"),
        ("segnet_basic", {}, [3, 3000, 3000], "one example takes a tensor of 579076096 numbers, more than 268435456"),
        ("torchvision:resnet18", {}, [3, 8000, 8000], "product is at most 33554432"),
        ("timm:resnet18", {}, [1, 8000, 8000], "product is at most 33554432"),
        ("smp:Unet/resnet18", {"decoder_channels": [512, 256, 128, 64, 64]}, [3, 3008, 3008], "numbers, more than 2"),
    ],
)
def test_the_size_of_an_example_is_bounded_by_what_it_costs(builder, kwargs, size, message, tmp_path):
    sized = {} if builder == "resnet20" else {"input_size": [size[0], 64, 64]}
    model = zoo.create(builder, **kwargs, **sized)
    bl.save_posterior(model, tmp_path / "p")
    zoo.load(tmp_path / "p")
    card = json.loads((tmp_path / "p" / CONFIG).read_text())
    card |= {"input_size": size, "kwargs": card["kwargs"] | {"input_size": size}}
    (tmp_path / "p" / CONFIG).write_text(json.dumps(card))
    with pytest.raises(bl.PosteriorError, match=message):
        zoo.load(tmp_path / "p")


def test_a_card_names_no_more_classes_than_its_network_has(valid):
    card = json.loads((valid / CONFIG).read_text())
    (valid / CONFIG).write_text(json.dumps(card | {"class_names": ["x"] * 100_000}))
    with pytest.raises(bl.PosteriorError, match="at most the 2 classes of its network in class_names, got 100000"):
        zoo.load(valid)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("patterns", [["*"] * 20_000, ["?" * 200_000], ["*conv1"] * 1001])
def test_patterns_of_a_card_are_counted(argument, patterns, valid):
    card = json.loads((valid / CONFIG).read_text()) | {"builder": "torchvision:resnet18", "input_size": [3, 224, 224]}
    (valid / CONFIG).write_text(json.dumps(card | {"kwargs": {argument: patterns}}))
    with pytest.raises(
        bl.PosteriorError, match=f"{argument} must hold at most 1000 patterns|at most 100000 characters"
    ):
        zoo.load(valid)
