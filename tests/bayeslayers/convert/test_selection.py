"""Selectors: by name, by class, by function; and the report, which lists what they chose."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl


def reasons(report: bl.ConversionReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.entries}


def converted(report: bl.ConversionReport) -> list[str]:
    return [entry.name for entry in report.entries if entry.status == "converted"]


class Branches(nn.Module):
    """A network with paths of several levels, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.stage = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ("head", ["head.weight", "head.bias"]),
        (["head.*"], ["head.weight", "head.bias"]),
        ("stem", ["stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"]),
        ("st*.0", ["stem.0.weight", "stem.0.bias", "stage.0.weight"]),
        (nn.LayerNorm, ["stem.1.weight", "stem.1.bias"]),
        (bl.norms, ["stem.1.weight", "stem.1.bias", "stage.1.weight", "stage.1.bias"]),
        ((bl.last_layer, nn.BatchNorm1d), ["stage.1.weight", "stage.1.bias", "head.weight", "head.bias"]),
        (["to*", "head"], ["token", "head.weight", "head.bias"]),
        (lambda modules: ["stage.2"], ["stage.2.weight", "stage.2.bias"]),
    ],
)
def test_selectors(selectors, expected):
    _, report = bl.to_bayesian(Branches(), include=selectors)
    assert converted(report) == expected
    others = {reason for name, reason in reasons(report).items() if name not in expected}
    assert others == {"not included"}
    _, rest = bl.to_bayesian(Branches(), exclude=selectors)
    assert converted(rest) == [entry.name for entry in rest.entries if entry.name not in expected]


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        ("haed", ValueError, "exclude must name modules of the network, got 'haed'. Did you mean 'head'"),
        ("*.bias", ValueError, r"exclude must name whole layers, got '\*.bias', which matches 'stem.0.bias'"),
        (nn.Conv2d, ValueError, "it has no Conv2d"),
        (lambda modules: ["sterm"], ValueError, "got 'sterm'. Did you mean 'stem'"),
        (3, TypeError, "names, module classes or functions, got 3"),
    ],
)
def test_mistaken_selectors_are_refused(selector, error, message):
    with pytest.raises(error, match=message):
        bl.to_bayesian(Branches(), exclude=selector)


def test_report_lists_every_tensor_and_prints():
    net = Branches()
    _, report = bl.to_bayesian(net, exclude="stem")
    parameters = dict(net.named_parameters())
    assert [(e.name, e.shape, e.numel) for e in report.entries] == [
        (name, tuple(p.shape), p.numel()) for name, p in parameters.items()
    ]
    total = sum(p.numel() for p in parameters.values())
    assert report.totals == {"converted": total - 24, "deterministic": 24, "tied": 0}
    assert_close(report.coverage, (total - 24) / total)
    text = str(report)
    for word in (*parameters, "4x4", "excluded", "24 deterministic", f"{report.coverage:.1%}", "by Adam"):
        assert word in text
