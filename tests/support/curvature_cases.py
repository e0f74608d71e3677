"""Pairs of a Bayesian layer and its counterpart, their inputs and a loss, for the tests of curvature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayeslayers as bl
from bayeslayers.layers import FilterResponseNorm2d


def case_id(value: object) -> str:
    return str(value).replace(" ", "")


def per_case(cases: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "args", "kwargs", "shape"), cases, ids=case_id)


def make_pair(kind: str, args: tuple, kwargs: dict) -> tuple[bl.BayesianLayer, nn.Module]:
    """Return a Bayesian layer and its torch.nn counterpart, in float64, with the same random parameters."""
    torch.manual_seed(0)
    counterpart = getattr(nn, kind, FilterResponseNorm2d)(*args, **kwargs)  # the one that torch.nn has not
    layer = getattr(bl, "Bayes" + kind)(*args, **kwargs)
    for parameter in counterpart.parameters():
        nn.init.normal_(parameter)
    layer.load_state_dict(counterpart.state_dict())
    return layer.double(), counterpart.double()


def make_input(kind: str, shape: tuple) -> torch.Tensor:
    if kind == "Embedding":  # 6 ids for up to 6 places: some occur twice in an example
        return torch.randint(6, shape)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def potential(y: torch.Tensor) -> torch.Tensor:
    """A loss that is summed over examples and whose gradient depends on every output."""
    return (y.square() + y.sin()).sum()
