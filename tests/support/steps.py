"""Small float64 networks, batches and noise, and one step on them, for the tests of optimizers."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

SAME = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(bl.BayesLinear(3, 4), nn.Tanh(), bl.BayesLinear(4, 2)).double()


def make_mixed_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), bl.BayesLinear(4, 2)).double()


def make_batch(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, generator=seeded(seed), **F64), torch.randn(n, 2, generator=seeded(seed + 1), **F64)


def make_noise(net: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = seeded(seed)
    return {s.name: torch.randn(s.mean.shape, generator=generator, **F64) for s in bl.posterior(net)}


def make_optimizer(net: nn.Module, **kwargs) -> bl.VOGN:
    arguments = {"dataset_size": 50, "lr": 0.1, "precision_lr": 0.1, "init_precision": 100.0, "generator": seeded()}
    return bl.VOGN(net, **{**arguments, **kwargs})


def squared_error(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean over examples of half the squared error: a Gaussian's negative log-likelihood."""
    return (net(x) - y).square().sum() / (2 * len(x))


def run_scope(optimizer: bl.VOGN, net: nn.Module, x, y, noise=None) -> None:
    with optimizer.sampled(noise=noise):
        squared_error(net, x, y).backward()


def closure_for(optimizer: bl.VOGN, net: nn.Module, x, y):
    def closure():
        optimizer.zero_grad()
        loss = squared_error(net, x, y)
        loss.backward()
        return loss

    return closure


def state_of(net: nn.Module, optimizer: bl.VOGN | None = None) -> dict[str, torch.Tensor]:
    """Return a copy of the posterior, and of the optimizer's tensors."""
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    for index, state in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert_close(one, other, **SAME, equal_nan=False)


def scaled_step(net: nn.Module, optimizer: bl.VOGN, scaler: torch.amp.GradScaler, factor: float = 1.0) -> None:
    with optimizer.sampled(noise=make_noise(net)):
        scaler.scale(squared_error(net, *make_batch()) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def assert_every_tensor_moves(net: nn.Module, batch: bl.Inputs, y: torch.Tensor, method, **options) -> None:
    """Two steps of an optimiser move every mean and every precision of a network."""
    optimizer = method(net, dataset_size=20, **options)
    assert optimizer.report.coverage == 1
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        with optimizer.sampled():
            F.cross_entropy(net(*batch.args), y).backward()
        optimizer.step()
    moved = {key for key, value in before.items() if not torch.equal(value, net.state_dict()[key])}
    names = [name for name, _ in net.named_parameters()]
    assert {*names, *(f"{name}_precision" for name in names)} <= moved
