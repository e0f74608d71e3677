"""Steps that ranks make together equal those of one process, for every optimiser."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.ranks import WHAT_FORKS_SAY, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
]
N = 40
STEPS = 20


def net():
    """Return a network with a convolution, linear layers, and a deterministic parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        bl.BayesConv2d(1, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.PReLU(),
        bl.BayesLinear(12, 4),
        nn.Tanh(),
        bl.BayesLinear(4, 3),
    )
    return model.double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(step, n=8):
    generator = seeded(100 + step)
    return torch.randn(n, 1, 4, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


VOGN = {"lr": 0.05, "precision_lr": 0.1, "init_precision": 200.0}
IVON = {"lr": 0.1, "hess_init": 0.5, "beta2": 0.9}
KFAC = {"lr": 0.05, "damping": 0.1, "inverse_every": 2}
CASES = {
    "vogn": (bl.VOGN, VOGN),
    "vogn_samples": (bl.VOGN, VOGN | {"num_samples": 2}),
    "vogn_fraction": (bl.VOGN, VOGN | {"curvature_fraction": 0.4}),
    "vogn_sum": (bl.VOGN, VOGN | {"loss_reduction": "sum"}),
    "vogn_groups": (bl.VOGN, VOGN | {"num_mc_groups": 2, "num_samples": 2}),
    "ogn": (bl.OGN, VOGN),
    "ivon_price": (bl.IVON, IVON | {"num_samples": 2}),
    "ivon_gradsq": (bl.IVON, IVON | {"estimator": "gradsq", "num_samples": 2}),
    "ivon_groups": (bl.IVON, IVON | {"estimator": "gradsq", "num_mc_groups": 2}),
    "bbb": (bl.BBB, {"lr": 0.01, "init_precision": 100.0}),
    "kfac": (bl.KFAC, KFAC),
    "noisykfac": (bl.NoisyKFAC, KFAC | {"init_precision": 100.0}),
    "noisykfac_groups": (bl.NoisyKFAC, KFAC | {"init_precision": 100.0, "num_mc_groups": 2}),
    "kfac_empirical": (bl.KFAC, KFAC | {"fisher": "empirical", "update_every": 3}),
    "swag": (bl.SWAG, {"lr": 0.05, "start_step": 5}),
}


def step(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        own = optimizer.part(len(x))
        loss = F.cross_entropy(model(x[own]), y[own], reduction=optimizer.loss_reduction)
        loss.backward()
        return loss

    return optimizer.step(closure if len(x) else None)


def states(model, optimizer):
    found, own = {key: value.clone() for key, value in model.state_dict().items()}, optimizer.state_dict()
    for index, state in own["state"].items():
        found |= {f"{index}.{key}": torch.as_tensor(value).clone().contiguous() for key, value in state.items()}
    return found if own["generator"] is None else found | {"generator": own["generator"]}


def made(name, model, **options):
    kind, own = CASES[name]
    if kind is not bl.SWAG:
        own = own | {"generator": seeded(5)}
    return kind(model, N, **own, **options)


def trained(name, cut, **options):
    """Return the state after some steps, each on the part of a batch that `cut` leaves."""
    model = net()
    optimizer = made(name, model, **options)
    for number in range(STEPS):
        x, y = batch(number)
        step(optimizer, model, cut(x, number), cut(y, number))
    return states(model, optimizer)


def every_optimiser(world, folder):
    for name in CASES:
        save_file(trained(name, lambda x, _: x[world.part(len(x))], sync=True), folder / f"{name}{world.rank}")
    # 3 and 5 examples, and a rank without any in every other step
    cuts = (slice(3), slice(3, 8)), (slice(8), slice(8, 8))
    for name in UNEQUAL:
        own = trained(name, lambda x, number: x[cuts[number % 2][world.rank]], sync=True)
        save_file(own, folder / f"{name}_unequal{world.rank}")
    save_file(trained("vogn_groups", lambda x, _: x[:7][world.part(7)], sync=True), folder / f"seven{world.rank}")
    save_file(norm_statistics(lambda x: x[world.part(8)], sync=True), folder / f"norm{world.rank}")
    # the same examples for both ranks, which are two sample groups
    save_file(trained("vogn_groups", lambda x, _: x, sync=True), folder / f"groups{world.rank}")
    save_file(trained("vogn", lambda x, _: x[world.part(len(x))], sync="bfloat16"), folder / f"wire{world.rank}")


UNEQUAL = ("vogn", "ivon_price", "ivon_gradsq", "bbb", "noisykfac")


def norm_statistics(cut, **options):
    """Return the running statistics of a norm that sees the inputs of one step, or of its parts."""
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.25), nn.Flatten(), bl.BayesLinear(16, 3)).double()
    x, y = batch(0)
    step(bl.VOGN(model, N, generator=seeded(5), **options), model, cut(x), cut(y))
    return {key: value.clone() for key, value in model[0].named_buffers() if key.startswith("running")}


def step_of_both_groups(optimizer, model, x, y):
    """Take a step whose sample groups all see every example."""

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def test_two_ranks_of_half_a_batch_are_one_process_for_every_optimiser(tmp_path):
    assert run_ranks(every_optimiser, tmp_path) == [None, None]

    def assert_both(name, whole, **tolerance):
        for rank in range(2):
            found = load_file(tmp_path / f"{name}{rank}")
            found.pop("" if "generator" in whole else "generator", None)  # SWAG draws nothing
            assert_close(found, whole, **tolerance, msg=lambda message: f"{name}: {message}")

    for name in CASES:
        whole = trained(name, lambda x, _: x)
        assert_both(name, whole, rtol=1e-8, atol=1e-10)
        if name in UNEQUAL:
            assert_both(f"{name}_unequal", whole, rtol=1e-8, atol=1e-10)
        if name == "vogn":  # the mean of two ranks in 8 bits, 20 times
            found = load_file(tmp_path / "wire0")
            assert not torch.allclose(found["0.weight"], whole["0.weight"], rtol=1e-6)
            assert_both("wire", found, rtol=0, atol=0)
            assert_close(found["0.weight"], whole["0.weight"], rtol=0.05, atol=0.02)
    assert_both("seven", trained("vogn_groups", lambda x, _: x[:7]), rtol=1e-8, atol=1e-10)
    halves = [norm_statistics(lambda x, own=own: x[own]) for own in (slice(4), slice(4, 8))]
    mean = {key: torch.stack([half[key] for half in halves]).mean(0) for key in halves[0]}
    assert_both("norm", mean, rtol=1e-12, atol=0)
    assert_close(mean["running_mean"], norm_statistics(lambda x: x)["running_mean"])
    model = net()
    optimizer = made("vogn_groups", model)
    for number in range(STEPS):
        step_of_both_groups(optimizer, model, *batch(number))
    assert_both("groups", states(model, optimizer), rtol=1e-8, atol=1e-10)
    one, other = (trained(name, lambda x, _: x)["0.weight"] for name in ("vogn_samples", "vogn_groups"))
    assert not torch.allclose(one, other)


def said(act):
    """Return what an act says when it fails."""
    try:
        act()
    except (RuntimeError, ArithmeticError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused_together(world, folder):
    """Fail in several ways, each on one rank alone, and go on: all refuse the same steps."""
    found, model = {}, net()
    optimizer = made("vogn", model, sync=True)
    before = states(model, optimizer)

    def attempt(factor=1.0, error=None):
        x, y = (tensor[world.part(8)] for tensor in batch(0))

        def closure():
            optimizer.zero_grad()
            if error is not None and world.rank == 1:
                raise error
            loss = F.cross_entropy(model(x), y)
            (loss * (factor if world.rank == 1 else 1.0)).backward()
            return loss

        optimizer.step(closure)

    found["gradient"] = said(lambda: attempt(math.nan))
    found["closure"] = said(lambda: attempt(error=FloatingPointError("the loss must be finite, got nan.")))
    found["reading"] = said(lambda: attempt(error=OSError("no such image")))
    found["draws"] = said(optimizer.step)
    for key, value in before.items():
        assert torch.equal(states(model, optimizer)[key], value) or key == "generator", key
    attempt()
    found["generator"] = optimizer.state_dict()["generator"].sum().item()
    found["moved"] = model[0].weight.sum().item()

    # one batch fewer on rank 1
    with optimizer.joined():
        for number in range(3 - world.rank):
            step(optimizer, model, *(tensor[world.part(8)] for tensor in batch(number)))
    found["joined"] = model[0].weight.sum().item()

    model, (x, y) = DistributedDataParallel(net()), batch(0)
    wrapped, messages = made("vogn", model.module), []
    found["wrapped"] = said(lambda: step(wrapped, model, x, y))
    wrapped = made("vogn", model)
    found["unequal"] = said(lambda: step(wrapped, model, x[: 3 + world.rank], y[: 3 + world.rank]))
    wrapped = made("vogn", model)
    with counted(messages):
        step(wrapped, model, *(tensor[world.part(8)] for tensor in batch(0)))
    found["ddp"] = [state.tolist() for key, state in model.module.state_dict().items() if key.endswith("4.weight")]
    found["ddp messages"] = messages

    model, messages = nn.Sequential(bl.BayesLinear(16, 30), nn.Tanh(), bl.BayesLinear(30, 3)), []
    optimizer = bl.VOGN(model, N, sync=True)
    with counted(messages):
        step(optimizer, model, x.float().flatten(1), y)
    found["messages"] = messages

    found["model"] = said(lambda: bl.VOGN(nn.Linear(2, 2 + world.rank), N, sync=True))
    found["frozen"] = said(lambda: bl.VOGN(net().requires_grad_(world.rank == 0), N, sync=True))
    found["size"] = said(lambda: bl.VOGN(net(), N + world.rank, sync=True))
    found["groups"] = said(lambda: bl.VOGN(net(), N, sync=True, num_mc_groups=3))
    found["ivon"] = trained_in_wrapper(world)
    return found


class counted:
    """Note the bytes of each reduction inside the scope."""

    def __init__(self, messages):
        self.messages, self.reduce = messages, dist.all_reduce

    def __enter__(self):
        def all_reduce(tensor, *args, **kwargs):
            self.messages.append(tensor.nbytes)
            return self.reduce(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce

    def __exit__(self, *_):
        dist.all_reduce = self.reduce


def trained_in_wrapper(world):
    """Return a sum of the posterior that IVON leaves in a DistributedDataParallel."""
    total = 0.0
    for name in ("ivon_price", "ivon_gradsq"):
        model = DistributedDataParallel(net())
        optimizer = made(name, model)
        for number in range(3):
            step(optimizer, model, *(tensor[world.part(8)] for tensor in batch(number)))
        total += sum(value.sum().item() for value in model.module.state_dict().values())
    return total


def test_what_one_rank_refuses_all_refuse_and_what_crosses_the_wire(tmp_path):
    first, second = run_ranks(refused_together, tmp_path)
    bad = "FloatingPointError: the gradient of '0.weight' must be finite, got 27 of 27 entries"
    assert second["gradient"].startswith(bad)
    assert first["gradient"].startswith(f"NumbersError: rank 1 has failed, where all ranks stop. {bad}")
    assert "rank 1 has failed, where all ranks stop. FloatingPointError: the loss must be" in first["closure"]
    assert "rank 1 has failed, where all ranks stop. OSError: no such image" in first["reading"]
    assert first["draws"] == second["draws"] and "must follow a backward pass" in first["draws"]
    assert "sync must be on for a model in DistributedDataParallel" in first["wrapped"]
    assert (
        first["unequal"].startswith("ValueError: ranks must have equally many examples under")
        and "3, 4" in first["unequal"]
    )
    for key in ("generator", "moved", "joined", "ddp", "ivon", "wrapped", "unequal", "frozen", "size", "groups"):
        assert first[key] == second[key], key

    model = net()
    optimizer = made("vogn", model)
    step(optimizer, model, *batch(0))
    assert_close(torch.tensor(first["ddp"][0]).double(), model[4].weight.detach(), rtol=1e-5, atol=1e-6)
    posterior = sum(p.numel() for name, p in model.named_parameters() if name != "3.weight")
    assert first["ddp messages"] == [8 * posterior]  # the squares; DistributedDataParallel sends the gradients
    parameters = 16 * 30 + 30 + 30 * 3 + 3
    assert first["messages"] == [2 * 4 * parameters]

    total = 0.0
    for name in ("ivon_price", "ivon_gradsq"):
        model = net()
        optimizer = made(name, model)
        for number in range(3):
            step(optimizer, model, *batch(number))
        total += sum(value.sum().item() for value in model.state_dict().values())
    assert first["ivon"] == pytest.approx(total, rel=1e-9)
    assert (
        "shape of the parameters must be the same on all ranks, got bias: [3] on rank 1 and bias: [2] on rank 0"
        in first["model"]
    )
    assert "trainable parameters must be the same on all ranks, got 0.bias: False on rank 1" in first["frozen"]
    assert "dataset_size must be the same on all ranks, got 41 on rank 1 and 40 on rank 0. Start all" in first["size"]
    assert "num_mc_groups must divide the number of ranks, or be a multiple of it, 2, got 3." in first["groups"]


def test_a_process_alone_needs_a_group_for_sync_and_a_known_type_for_the_wire():
    with pytest.raises(RuntimeError, match=r"sync must be off without a process group\. .*bl.distributed.start"):
        bl.VOGN(net(), N, sync=True)
    with pytest.raises(ValueError, match="sync must be true, false or 'bfloat16', got 'int8'"):
        bl.VOGN(net(), N, sync="int8")
    with pytest.raises(ValueError, match="num_mc_groups must be an integer >= 1, got 0"):
        bl.VOGN(net(), N, num_mc_groups=0)
