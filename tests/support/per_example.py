"""The oracle of curvature: per-example gradients by one backward pass for each example, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import bayeslayers as bl

EXACT = {"rtol": 1e-10, "atol": 1e-12}
F64 = {"dtype": torch.float64}


def potential(y: torch.Tensor) -> torch.Tensor:
    """A loss that is summed over examples and whose gradient depends on every output."""
    return (y.square() + y.sin()).sum()


def bayesian(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return a converted network in float64 with random parameters."""
    torch.manual_seed(seed)
    net = bl.to_bayesian(net.double())[0]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return net


def squares_by_autograd(
    net: nn.Module, loss: Callable[..., torch.Tensor], *inputs: torch.Tensor, examples: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """Return sums over examples of squared gradients by name, where each example goes through the network alone."""
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    sums = {name: torch.zeros_like(net.get_parameter(name)).detach() for name in names}
    for i in range(len(inputs[0]))[examples]:
        row = [x[i : i + 1] for x in inputs]
        grads = torch.autograd.grad(loss(net, *row), [net.get_parameter(name) for name in names])
        for name, grad in zip(names, grads, strict=True):
            sums[name] += grad.square()
    return sums


def tracked_squares(net: nn.Module, loss: Callable[..., torch.Tensor], *inputs: torch.Tensor, parts: int = 1) -> dict:
    """Return what `tracked` sums over one backward pass for each part of the batch."""
    with bl.tracked(net) as tracker:
        for part in zip(*[x.chunk(parts) for x in inputs], strict=True):
            loss(net, *part).backward()
    assert tracker.examples == len(inputs[0])
    return {name: leaf.grad for name, leaf in tracker.leaves.items()}
