from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import bayeslayers as bl
import zoo
from bayeslayers.storage.training_state import load_checkpoint
from recipes.cli import main
from recipes.cli.train import CONFIGS
from recipes.data.split import NAMES
from recipes.training.config import check
from recipes.training.methods import make_optimizer, method_of
from zoo import registry
from zoo.networks import alexnet, resnet, vgg

ALL = [  # but the configurations of other recipes
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if yaml.safe_load(path.read_text()).get("recipe", "classification") == "classification"
]
every_config = pytest.mark.parametrize("name", ALL)

SETS = {  # folder: data, shape of an input, classes
    "mnist": ("mnist", (1, 28, 28), 10),
    "fashion": ("fashion-mnist", (1, 28, 28), 10),
    "cifar10": ("cifar10", (3, 32, 32), 10),
    "cifar100": ("cifar100", (3, 32, 32), 100),
    "imagenet": ("imagefolder:data/imagenet", (3, 224, 224), 1000),
}
WANTED = {
    "mnist/mlp": "adam vogn ivon",
    "mnist/lenet5": "adam sgd vogn ogn ivon bbb swag kfac noisykfac laplace mcdropout",
    "fashion/mlp": "adam vogn ivon",
    "fashion/lenet5": "adam vogn ivon",
    "cifar10/lenet5": "adam adam_paper kfac noisykfac vogn ivon bbb mcdropout",
    "cifar10/lenet5_bn": "vogn ivon",
    "cifar10/lenet5_dist": "adam sgd kfac vogn",
    "cifar10/alexnet": "adam sgd kfac noisykfac vogn ivon adam_20 vogn_20 ivon_20",
    "cifar10/vgg19": "adam vogn ivon",
    "cifar10/resnet18": "adam sgd vogn ivon",
    "cifar10/cifarnet": "sgd sgd_vogn sgd_ivon",
    "cifar10/lite0": "adamw adamw_vogn",
    "cifar10/resnet20": "sgd vogn ivon sgd_ivon sgd_swag",
    "cifar10/wrn28_10": "sgd vogn ivon",
    "cifar100/alexnet": "adam sgd vogn ivon",
    "cifar100/resnet18": "adam sgd vogn ivon",
    "imagenet/resnet18": "adam sgd kfac noisykfac vogn vogn_4gpu ivon",
    "imagenet/resnet50": "vogn ivon",
}


@cache
def parsed(name):
    """The configuration as the command line reads it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESLAYERS_TRACEBACK", "1")
        patch.setattr("recipes.tasks.task.Task.train", lambda task, *_: found.append(task.config) or {})
        assert main(["train", name]) == 0
    return found[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four random images of each set, under the name by which a run finds them."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    places = {}
    for name, (_, (channels, height, width), classes) in SETS.items():
        if name == "imagenet":  # pictures of any size
            picture = Image.fromarray(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8))
            for part in itertools.product(("train", "val"), range(classes)):
                (place := folder.joinpath(name, *map(str, part))).mkdir(parents=True)
                picture.save(place / "0.png")
            places[name] = f"imagefolder:{folder / name}"
        else:
            for part in ("train", "test"):
                images = rng.integers(0, 256, (4, height, width, channels), dtype=np.uint8)
                np.savez(folder / f"{name}_{part}.npz", images=images, labels=[0, classes - 1, 1, 2])
            places[name] = f"npz:{folder / name}_{{split}}.npz"
    return places


@pytest.fixture
def thin(monkeypatch):
    """Leave the deep networks a few channels; they are built by the same code, with the same arguments."""
    wide_resnet = resnet.wide_resnet
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    # Of fewer channels, channels last, a 1x1 convolution of stride 2 crashes torch 2.15 on the CPU.
    registry._BUILDERS["resnet18"] = resnet._resnet("thin_resnet18", resnet.BasicBlock, 16, (2, 2, 2, 2))
    registry._BUILDERS["resnet50"] = resnet._resnet("thin_resnet50", resnet.Bottleneck, 64, (1, 1, 1, 1))
    monkeypatch.setattr(vgg, "WIDTHS", (4, 4, 4, 4, 4))
    monkeypatch.setattr(resnet, "wide_resnet", lambda k, size, depth, width, *rest: wide_resnet(k, size, 10, 1, *rest))
    layers = {
        "BayesConv2d": lambda i, o, *rest, **more: bl.BayesConv2d(i if i == 3 else i // 32, o // 32, *rest, **more),
        "BayesLinear": lambda i, o: bl.BayesLinear(i // 32, o),
    }
    monkeypatch.setattr(alexnet, "bl", SimpleNamespace(**layers))


@pytest.fixture
def no_plots(monkeypatch):
    """Draw nothing at the end of a run: it takes longer than all the rest."""
    for name in ("task.training_curves", "posterior_task.write_report"):
        monkeypatch.setattr(f"recipes.tasks.{name}", lambda *_: None)


def take_two_steps(name, data, folder, monkeypatch):
    """Train by the command line, and check what two steps leave."""
    monkeypatch.setenv("BAYESLAYERS_TRACEBACK", "1")
    config = parsed(name)
    torch.manual_seed(config.seed)
    model = zoo.create(**config.model)
    make_optimizer(config.optimizer, model, 4, config.seed)  # it sets precisions
    start = model.state_dict()
    options = f"--limit 4 --batch_size 2 --epochs 1 --compile false --workers 0 --output {folder}"
    options += f" --data {data[name.split('/')[0]]}"
    if "num_mc_groups" in config.optimizer:  # each of which wants an example
        options += " --optimizer.num_mc_groups 2"
    if config.start is not None:  # a run that is not there
        bl.save_posterior(model, folder.with_name("start"))
        options += f" --start {folder.with_name('start')}"
    if config.optimizer["name"] == "swag":  # which averages from a step on that two do not reach
        options += " --optimizer.start_step 1 --optimizer.average_every 1"
    measure = "--evaluation.num_samples 2 --evaluation.epoch_samples 1 --evaluation.ood [] --evaluation.batch_size 4"
    assert main(["train", name, *options.split(), *measure.split()]) == 0
    state = load_checkpoint(folder / "checkpoint.safetensors")
    assert state["epoch"] == 1 and state["schedulers"][0]["last_epoch"] == 2
    found = state["model"]
    assert all(value.isfinite().all() for value in found.values())
    moved = {key for key in start if not torch.equal(found[key], start[key])}
    assert [key for key, _ in model.named_parameters()][-1] in moved
    precisions = {key.replace("_prior_mean", "_precision") for key in start if key.endswith("_prior_mean")}
    assert precisions & moved == (set() if method_of(config.optimizer).point else precisions)
    assert (folder / "metrics.json").is_file()


@every_config
def test_it_takes_two_steps(name, data, thin, no_plots, tmp_path, monkeypatch, one_thread):
    take_two_steps(name, data, tmp_path / "run", monkeypatch)


@pytest.mark.slow
@every_config
def test_it_takes_two_steps_at_full_width(name, data, no_plots, tmp_path, monkeypatch):
    take_two_steps(name, data, tmp_path / "run", monkeypatch)


@every_config
def test_its_network_takes_its_data_at_full_width(name):
    config, (data, shape, classes) = parsed(name), SETS[name.partition("/")[0]]
    check(config)
    config.augmentation.check(shape)
    assert config.data == data
    with torch.device("meta"):
        model = zoo.create(**config.model)
        assert model(torch.empty(2, *shape)).shape == (2, classes)
    assert zoo.card_of(model).input_size == list(shape)


def test_the_configurations_are_these():
    expected = {f"{net}_{method}" for net, methods in WANTED.items() for method in methods.split()}
    assert expected == set(ALL)


@pytest.mark.parametrize("name", [name for name in ALL if name.rpartition("/")[2] in ("resnet18_adam", "resnet18_sgd")])
def test_weight_decay_spares_the_norms_of_theirs(name):
    model = zoo.create(**parsed(name).model)
    decayed, spared = make_optimizer(parsed(name).optimizer, model, 4, 0).param_groups
    assert decayed["weight_decay"] > 0 == spared["weight_decay"]
    assert len(spared["params"]) == 2 * len(bl.norms(dict(model.named_modules())))


def test_no_two_runs_have_one_name():
    names = [parsed(name).name for name in ALL]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("folder", SETS)
def test_runs_on_one_set_normalise_alike_and_ask_about_the_same_ood_data(folder):
    configs = [parsed(name) for name in ALL if name.startswith(f"{folder}/")]
    own = [
        config for config in configs if config.model["name"] != "efficientnet_lite0"
    ]  # normalised as its weights ask
    assert len({str((config.model["mean"], config.model["std"])) for config in own}) == 1
    (ood,) = {tuple(config.evaluation.ood) for config in configs}
    assert set(ood) <= NAMES.keys() - {SETS[folder][0]}


def test_the_manual_names_every_configuration():
    text = (Path(__file__).parents[3] / "docs/recipes.md").read_text()
    assert [name for name in ALL if f"`{name}`" not in text] == []
