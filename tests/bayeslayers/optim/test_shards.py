"""Steps in shards are those of ranks that all keep the whole state, and what cannot be in shards is refused."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from support.ranks import WHAT_FORKS_SAY, run_ranks
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
    pytest.mark.filterwarnings(WHAT_FORKS_SAY),
]
N, STEPS = 40, 6
CASES = {
    "vogn": (bl.VOGN, {"lr": 0.05, "precision_lr": 0.1, "init_precision": 200.0, "num_samples": 2}),
    "ogn": (bl.OGN, {"lr": 0.05, "precision_lr": 0.1, "init_precision": 200.0}),
    "ivon": (bl.IVON, {"lr": 0.1, "hess_init": 0.5, "beta2": 0.9}),
    "bbb": (bl.BBB, {"lr": 0.01, "init_precision": 100.0}),
}


def net():
    """Return a network with uncertain and deterministic parameters and a norm."""
    torch.manual_seed(0)
    layers = bl.BayesLinear(6, 5), nn.PReLU(), nn.BatchNorm1d(5), bl.BayesLinear(5, 3)
    return nn.Sequential(*layers).double()


def batch(step, n=8):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def made(name, model, **options):
    kind, own = CASES[name]
    return kind(model, N, generator=torch.Generator().manual_seed(5), **own, sync=True, **options)


def train(world, optimizer, model, steps, factor=1.0):
    for number in steps:
        x, y = (tensor[world.part(8)] for tensor in batch(number))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * factor
            loss.backward()
            return loss

        optimizer.step(closure)


def held(optimizer):
    """Return how many numbers the state of a rank holds."""
    return sum(v.numel() for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor))


def every_optimiser(world, folder):
    found = {}
    for name in CASES:
        models, optimizers = zip(*((m := net(), made(name, m, shard=shard)) for shard in (False, True)), strict=True)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(world, optimizer, model, range(STEPS))
        assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-10, atol=1e-12)
        whole, of_shards = (optimizer.state_dict() for optimizer in optimizers)
        assert_close(of_shards["state"], whole["state"], rtol=1e-10, atol=1e-12)
        found[name] = [held(optimizer) for optimizer in optimizers]
        again = net()
        optimizer = made(name, again, shard=True)
        again.load_state_dict(models[1].state_dict())
        optimizer.load_state_dict(of_shards)
        assert held(optimizer) == found[name][1]
        for model, own in ((models[0], optimizers[0]), (again, optimizer)):
            own._generator.set_state(whole["generator"])
            train(world, own, model, range(STEPS, STEPS + 2))
        assert_close(again.state_dict(), models[0].state_dict(), rtol=1e-10, atol=1e-12)
    return found


def test_steps_in_shards_are_those_of_whole_states_which_take_the_ranks_share_of_memory(tmp_path):
    ranks = run_ranks(every_optimiser, tmp_path, size=3)
    for name in CASES:
        whole = ranks[0][name][0]
        assert sum(found[name][1] for found in ranks) == whole
        assert max(found[name][1] for found in ranks) < 0.7 * whole, name  # three matrices of 30, 15 and vectors


def refused(world, folder):
    """Overflow where one rank alone moves the tensor: all refuse, and nothing has changed."""
    model = net()
    optimizer = made("vogn", model, shard=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    owner = optimizer._shards.owner[model[0].weight]
    if world.rank == owner:
        optimizer.param_groups[0]["lr"] = 1e308
    try:
        train(world, optimizer, model, [0])
        said = "nothing"
    except FloatingPointError as error:
        said = f"{type(error).__name__}: {error}"
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    optimizer.param_groups[0]["lr"] = 0.01
    train(world, optimizer, model, [1])
    return [world.rank == owner, said, moved, model[0].weight.sum().item()]


def test_a_step_that_one_rank_cannot_make_is_refused_by_all(tmp_path):
    found = run_ranks(refused, tmp_path)
    for owns, said, moved, total in found:
        kind = "FloatingPointError" if owns else "NumbersError: rank"
        assert said.startswith(kind) and "would not be finite" in said
        assert all(key.startswith("2.") for key in moved)  # BatchNorm's statistics, which the forward pass moves
        assert math.isfinite(total) and total == found[0][3]


def of_fsdp(world, folder):
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    fully_shard(model)
    said = []
    for make in (bl.IVON, bl.VOGN):
        with pytest.raises(ValueError) as caught:
            make(model, N, sync=True)
        said.append(str(caught.value))
    return said


def test_parameters_in_shards_of_fsdp_are_refused(tmp_path):
    for said in itertools.chain(*run_ranks(of_fsdp, tmp_path)):
        assert said.startswith("parameters must be whole on each rank") and "'weight' is a DTensor" in said


def test_shards_need_several_ranks_and_an_estimator_of_linear_statistics():
    with pytest.raises(ValueError, match="shard must be off without sync"):
        bl.VOGN(net(), N, shard=True)
    with pytest.raises(ValueError, match="shard must be off for estimator='gradsq'"):
        bl.IVON(net(), N, shard=True, estimator="gradsq")
