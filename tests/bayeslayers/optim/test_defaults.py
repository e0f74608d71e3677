from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import bayeslayers as bl
from bayeslayers.optim import defaults
from recipes.cli import main
from recipes.reports import benchmark_defaults, small_tasks

pytestmark = pytest.mark.usefixtures("one_thread")


def make_net(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bl.BayesLinear(2, 16, **options), nn.ReLU(), bl.BayesLinear(16, 3, **options))


def uncertain_group(optimizer):
    return next(group for group in optimizer.param_groups if group["kind"] == "bayesian")


def values_of(net: nn.Module, suffix: str) -> set[float]:
    return {float(v) for key, value in net.state_dict().items() if key.endswith(suffix) for v in value.unique()}


@pytest.mark.parametrize(("size", "temperature"), [(60, 1.0), (60, 0.5), (100_000, 1.0)])
def test_vogn_chooses_from_dataset_size_and_fan_in(size, temperature):
    net, ess = make_net(), size / temperature
    optimizer = bl.VOGN(net, dataset_size=size, temperature=temperature)
    fan_in = (32 * 2 + 48 * 16) / 80
    start = max(ess, 250 * fan_in)
    assert sorted(values_of(net, "_precision")) == pytest.approx([ess / 1000, start], rel=1e-6)
    group = uncertain_group(optimizer)
    assert group["lr"] == pytest.approx(0.5 * start / ess, rel=1e-6)
    assert group["lr"] * group["clip_radius"] == pytest.approx(3e-3)
    assert group["precision_lr"] == 1e-3 and group["temperature"] == temperature


def test_vogn_takes_smaller_and_bolder_steps_in_wide_networks():
    net = nn.Sequential(bl.BayesLinear(2100, 2), nn.Flatten())
    group = uncertain_group(bl.VOGN(net, dataset_size=100))
    assert group["lr"] == pytest.approx(0.5 * 3 * 2100 * 250 / 100, rel=1e-6)
    assert group["lr"] * group["clip_radius"] == pytest.approx(3e-3 / 3**1.4)


def test_ivon_takes_smaller_and_bolder_steps_with_less_noise_in_wide_networks():
    (group,) = bl.IVON(nn.Linear(2100, 2, bias=False), dataset_size=100).param_groups
    assert group["hess_init"] == pytest.approx(3 * 2100 * 250 / 100) and group["lr"] == pytest.approx(0.3 * 3)
    scale = group["lr"] * (group["hess_init"] + group["weight_decay"])
    assert scale * group["clip_radius"] == pytest.approx(3e-3 / 3**1.4)


@pytest.mark.parametrize("size", [60, 100_000])
def test_ivon_chooses_from_dataset_size_and_fan_in(size):
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    (group,) = bl.IVON(net, dataset_size=size).param_groups
    hessian = max(size, 250 * (32 * 2 + 48 * 16) / 80) / size
    assert group["hess_init"] == pytest.approx(hessian) and group["lr"] == 0.3 and group["beta2"] == 0.9995
    scale = group["lr"] * (group["hess_init"] + group["weight_decay"])
    assert scale * group["clip_radius"] == pytest.approx(3e-3)
    net[0].requires_grad_(False)  # its fan-in counts no more
    (group,) = bl.IVON(net, dataset_size=60).param_groups
    assert group["hess_init"] == pytest.approx(250 * 16 / 60)


def test_a_given_lr_keeps_the_plain_step_and_what_the_layers_carry():
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    group = uncertain_group(bl.VOGN(net, dataset_size=60, lr=1e-2))
    assert (group["lr"], group["precision_lr"], group["clip_radius"]) == (1e-2, 2e-3, math.inf)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    (group,) = bl.IVON(nn.Linear(2, 3), dataset_size=60, lr=0.2).param_groups
    assert (group["lr"], group["beta2"], group["hess_init"], group["clip_radius"]) == (0.2, 0.99999, 1.0, math.inf)


def test_given_arguments_keep_their_meaning():
    net = make_net()
    optimizer = bl.VOGN(net, 60, precision_lr=0.1, prior_precision=2.0, init_precision=120.0, clip_radius=0.7)
    group = uncertain_group(optimizer)
    assert values_of(net, "_precision") == {2.0, 120.0}
    assert (group["precision_lr"], group["clip_radius"]) == (0.1, 0.7)
    assert group["lr"] == pytest.approx(0.5 * 120 / 60)
    (group,) = bl.IVON(nn.Linear(2, 3), 60, beta2=0.9, hess_init=2.0, clip_radius=0.7).param_groups
    assert (group["beta2"], group["hess_init"], group["clip_radius"]) == (0.9, 2.0, 0.7)


def test_layers_built_with_values_of_their_own_keep_them():
    net = make_net(prior_precision=3.0, init_precision=500.0)
    bl.VOGN(net, 60)
    assert values_of(net, "_precision") == {3.0, 500.0}


@pytest.mark.parametrize("prior", [50.0, torch.full((16, 2), 50.0)], ids=["trained", "continual"])
def test_a_posterior_that_is_there_is_kept(prior):
    net = make_net()
    for site in bl.posterior(net):
        site.precision.copy_(1000 + torch.arange(site.precision.numel()).view_as(site.precision))
    if isinstance(prior, torch.Tensor):
        net[0].weight_prior_precision = prior
    before = copy.deepcopy(net.state_dict())
    optimizer = bl.VOGN(net, 60)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    mean = sum(float(s.precision.sum()) for s in bl.posterior(net)) / sum(s.mean.numel() for s in bl.posterior(net))
    assert uncertain_group(optimizer)["lr"] == pytest.approx(0.5 * mean / 60)


def test_groups_with_an_lr_have_the_plain_step_and_adam_its_own():
    net = nn.Sequential(bl.BayesLinear(2, 16), nn.ReLU(), bl.BayesLinear(16, 3), nn.Linear(3, 3))
    optimizer = bl.VOGN(net, 60, groups=[{"params": net[2].parameters(), "lr": 0.01}])
    head, rest, plain = optimizer.param_groups
    assert (head["lr"], head["clip_radius"]) == (0.01, math.inf)
    assert rest["lr"] > 0.5 and rest["lr"] * rest["clip_radius"] == pytest.approx(3e-3)
    assert plain["kind"] == "deterministic" and plain["lr"] == 1e-3
    assert bl.VOGN(net, 60, deterministic_lr=0.2).param_groups[-1]["lr"] == 0.2
    assert bl.VOGN(net, 60, lr=0.3).param_groups[-1]["lr"] == 0.3


@pytest.mark.parametrize("kind", [bl.VOGN, bl.IVON])
def test_no_entry_moves_further_than_the_bound(kind):
    net, x, y = make_net(), 1e3 * torch.randn(8, 2), torch.arange(8) % 3
    optimizer = kind(net, dataset_size=60, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        before = [p.detach().clone() for p in net.parameters()]
        with optimizer.sampled():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        moved = max(float((p.detach() - q).abs().max()) for p, q in zip(net.parameters(), before, strict=True))
        assert 1e-3 < moved < 3.01e-3


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
def test_a_bound_must_be_positive(radius):
    with pytest.raises(ValueError, match="clip_radius must be"):
        bl.VOGN(make_net(), 60, clip_radius=radius)


def one_step(net: nn.Module, size: int, **options) -> bl.VOGN:
    optimizer = bl.VOGN(net, size, generator=torch.Generator().manual_seed(0), **options)
    with optimizer.sampled():
        F.cross_entropy(net(torch.ones(6, 2)), torch.arange(6) % 3).backward()
    optimizer.step()
    return optimizer


def test_a_prior_that_outweighs_the_data_is_named_once():
    with pytest.warns(UserWarning, match=r"prior_precision 50 outweighs .* temperature = 40"):
        optimizer = one_step(net := make_net(), 20, temperature=0.5, prior_precision=50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.sampled():
            F.cross_entropy(net(torch.ones(6, 2)), torch.arange(6) % 3).backward()
        optimizer.step()
        one_step(make_net(), 20, temperature=0.1, prior_precision=50.0)
        one_step(make_net(), 5)
        one_step(make_net(), 20, prior_precision=50.0, lr=1e-3)


def test_defaults_reach_adam_on_the_toy():
    task = small_tasks.TASKS["toy"]
    data = task.read(None, 7)
    adam, *ours = (benchmark_defaults.run_defaults(task, data, method, 7) for method in benchmark_defaults.METHODS)
    assert 0.8 < adam[0] < 0.99
    for accuracy, nll, _, ece in ours:
        assert adam[0] - 0.01 < accuracy <= 1
        assert 0 < nll < adam[1] and 0 <= ece < 0.1


def test_the_benchmark_prints_rows(capsys):
    before = torch.random.get_rng_state()
    assert main(["benchmark", "defaults", "--tasks", "energy", "--seeds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["data"], row["method"], row["metric"]) for row in rows] == [
        ("energy", "stand-in", method, "rmse") for method in ("adam", "vogn", "ivon")
    ]
    assert all(0 < row["value"] < 1 and abs(row["nll"]) < 5 and row["seconds"] > 0 for row in rows)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert main(["benchmark", "defaults", "--tasks", "toys"]) == 1
    assert (
        "tasks must be among toy, mnist, fashion, energy, resnet18, unet, bert, gpt2, lstm, got 'toys'"
        in capsys.readouterr().err
    )


def test_every_task_fits_its_stand_in():
    for name, task in small_tasks.TASKS.items():
        data = task.read(None, 0)
        net = task.build().eval()
        with torch.no_grad():
            output = net(data.x[:2])
        assert math.isfinite(
            float(task.likelihood.loss(output, data.y[:2].clamp_min(0) if name != "energy" else data.y[:2]))
        )
        assert (len(data.x) > len(data.x_test)) == (name not in ("toy", "unet")), name


def test_tasks_read_a_folder_of_data(data_root, tmp_path):
    data = small_tasks.TASKS["mnist"].read(data_root, 0)
    assert data.source == "mnist" and data.x.shape[1:] == (1, 28, 28) and abs(float(data.x.mean())) < 1e-3
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.savez(tmp_path / f"cifar10_{split}.npz", images=rng.integers(0, 255, (30, 32, 32, 3), dtype=np.uint8),
                 labels=np.arange(30) % 10)  # fmt: skip
        for kind in (split, f"{split}annot"):
            (tmp_path / "CamVid" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "CamVid" / split / f"{number}.jpg")
            label = Image.fromarray(rng.integers(0, 12, (12, 16), dtype=np.uint8))
            label.save(tmp_path / "CamVid" / f"{split}annot" / f"{number}.png")
    (tmp_path / "uci").mkdir()
    columns = {"x": rng.normal(size=(40, 8)), "y": rng.normal(size=40), "test_index": np.arange(8).reshape(2, 4)}
    np.savez(tmp_path / "uci" / "energy.npz", **columns)
    assert small_tasks.TASKS["resnet18"].read(tmp_path, 0).x.shape == (30, 3, 32, 32)
    energy = small_tasks.TASKS["energy"].read(tmp_path, 1)
    assert energy.x.shape == (36, 8) and energy.y_test.shape == (4, 1)
    frames = small_tasks.TASKS["unet"].read(tmp_path, 0)
    assert frames.x.shape == (2, 3, 48, 64) and set(frames.y.unique().tolist()) == {small_tasks.IGNORED, *range(11)}
    (tmp_path / "CamVid" / "train").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="CamVid"):
        small_tasks.TASKS["unet"].read(tmp_path, 0)


def test_the_start_of_no_weights_is_ess():
    assert defaults.start_precision([torch.ones(3)], 40.0) == 40.0
