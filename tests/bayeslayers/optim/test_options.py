"""The options that optimisers share: one dataclass inside, whole signatures for those who read them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
from torch import nn

import bayeslayers as bl
from bayeslayers.optim.options import Options

KINDS = [bl.VOGN, bl.OGN, bl.IVON, bl.BBB, bl.KFAC, bl.NoisyKFAC, bl.SWAG]
FIELDS = {field.name: field for field in dataclasses.fields(Options)}
CHANGED = {
    "deterministic_lr": 0.25,
    "prior_precision": 3.0,
    "init_precision": 7.0,
    "num_samples": 3,
    "elements_per_example": 5.0,
}


def arguments_of(kind):
    return inspect.signature(kind).parameters


def make_mixed():
    return nn.Sequential(bl.BayesLinear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_spells_out_types_and_defaults_and_every_argument_is_documented(kind):
    for name, parameter in arguments_of(kind).items():
        assert parameter.annotation is not parameter.empty, name
        assert f"        {name}: " in kind.__doc__, name
        if name in FIELDS:
            assert parameter.default == FIELDS[name].default, name
            if (kind, name) != (bl.BBB, "init_precision"):  # which has no curvature to take it from
                assert parameter.annotation == FIELDS[name].type, name


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, n in itertools.product(KINDS, CHANGED) if n in arguments_of(k)]
)
def test_a_shared_option_reaches_the_optimiser(kind, name):
    net = make_mixed()
    optimizer = kind(net, 10, 0.1, **{name: CHANGED[name]})
    if name == "deterministic_lr":
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.25]
    elif name in ("prior_precision", "init_precision"):
        buffer = net[0].weight_prior_precision if name == "prior_precision" else net[0].weight_precision
        assert set(buffer.flatten().tolist()) == {CHANGED[name]}
    else:
        assert getattr(optimizer, name) == CHANGED[name]


def test_options_are_keywords_that_do_not_change():
    with pytest.raises(TypeError):
        Options([])  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().sync = True  # pyright: ignore
    assert Options.among({"sync": True, "self": None}, num_samples=2) == Options(sync=True, num_samples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"prior_precision": 0.0}, "prior_precision must be a finite number > 0, got 0.0"),
        ({"elements_per_example": float("inf")}, "elements_per_example must be a finite number > 0, got inf"),
    ],
)
def test_a_bad_option_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize(("value", "error"), [("curvature", TypeError), (-1.0, ValueError)])
def test_a_bad_first_precision_raises_before_the_model_changes(value, error):
    net = nn.Linear(2, 2)
    with pytest.raises(error, match=r"init_precision must be a .*number.*, got "):
        bl.BBB(net, 10, init_precision=value)
    assert list(net.state_dict()) == ["weight", "bias"]
