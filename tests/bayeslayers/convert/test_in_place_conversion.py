"""Conversion in place: the same objects with posteriors beside their tensors, or no change at all."""

from __future__ import annotations

import copy

import pytest
import torch
from support.subclasses import SUBCLASSES, name_of
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.convert import conversion
from bayeslayers.unwrap import unwrapped

SAME = {"rtol": 0, "atol": 0}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def kinds(net):
    return [type(module) for module in net.modules()]


def test_the_model_itself_comes_back_and_is_what_a_copy_would_be():
    net = make_net()
    copied, expected = bl.to_bayesian(net, prior_precision=3.0, init_precision=7.0)
    assert kinds(net) == kinds(make_net())
    tensors = {name: (tensor.data_ptr(), tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    converted, report = bl.to_bayesian(net, prior_precision=3.0, init_precision=7.0, inplace=True)
    assert converted is net and report == expected
    assert kinds(net) == kinds(copied)
    assert_close(dict(net.state_dict()), dict(copied.state_dict()), **SAME)
    state = net.state_dict(keep_vars=True)
    assert all(state[name] is tensor and tensor.data_ptr() == address for name, (address, tensor) in tensors.items())


@pytest.mark.parametrize(("layer", "shape"), SUBCLASSES, ids=name_of)
def test_layers_of_other_libraries_are_converted_where_they_stand(layer, shape):
    layer = copy.deepcopy(layer)
    expected, before = copy.deepcopy(layer.state_dict()), dict(layer.named_parameters())
    assert bl.to_bayesian(layer, inplace=True)[0] is layer
    assert isinstance(layer, bl.BayesianLayer)
    assert all(layer.get_parameter(name) is parameter for name, parameter in before.items())
    assert_close({key: layer.state_dict()[key] for key in expected}, dict(expected), **SAME)


def test_layers_are_chosen_as_for_a_copy():
    net = make_net()
    _, report = bl.to_bayesian(net, include=["0", "4"], exclude=nn.Conv2d, inplace=True)
    assert (type(net[0]), type(net[1]), type(net[4])) == (nn.Conv2d, nn.BatchNorm2d, bl.BayesLinear)
    assert report.totals == {"converted": 26, "deterministic": 63, "tied": 0}


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, lambda net: torch.compile(net, backend="eager")], ids=["dp", "ema", "co"]
)
def test_the_network_inside_a_wrapper_is_converted_under_its_own_names(wrap, inplace):
    model = wrap(make_net())
    converted, report = bl.to_bayesian(model, include="4", inplace=inplace)
    assert (converted is model) == inplace and type(converted) is type(model)
    assert type(unwrapped(converted)[4]) is bl.BayesLinear
    assert [entry.name for entry in report.entries if entry.status == "converted"] == ["4.weight", "4.bias"]
    assert inplace or kinds(unwrapped(model)) == kinds(make_net())


def test_fast_paths_are_turned_off_in_place():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    bl.to_bayesian(layer, inplace=True)
    assert layer.activation_relu_or_gelu == 0 and type(layer.linear1) is bl.BayesLinear


class TestAnErrorLeavesTheModelAsItWas:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"include": "fc"}, "include must name modules"),
            ({"exclude": "*"}, r"must have a layer that can become Bayesian, got none\. '0.weight': excluded"),
            ({"prior_precision": 0.0}, "prior_precision must be"),
        ],
        ids=["selector", "nothing", "value"],
    )
    def test_in_an_argument(self, options, message):
        net = make_net()
        before = copy.deepcopy(net)
        with pytest.raises(ValueError, match=message):
            bl.to_bayesian(net, inplace=True, **options)
        self.assert_same(net, before)

    @pytest.mark.parametrize("last", [1, 2, 3])
    def test_half_way(self, last, monkeypatch):
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        before, calls, convert = copy.deepcopy(encoder), [], conversion._convert

        def fails(layer, *precisions):
            convert(layer, *precisions)
            calls.append(layer)
            if len(calls) == last:
                raise RuntimeError("half way")

        monkeypatch.setattr(conversion, "_convert", fails)
        with pytest.raises(RuntimeError, match="half way"):
            bl.to_bayesian(encoder, inplace=True)
        self.assert_same(encoder, before)
        monkeypatch.undo()
        bl.to_bayesian(encoder, inplace=True)
        assert type(encoder.linear1) is bl.BayesLinear

    @staticmethod
    def assert_same(net, before):
        assert kinds(net) == kinds(before)
        for module, other in zip(net.modules(), before.modules(), strict=True):
            assert vars(module).keys() == vars(other).keys()
            assert module._buffers.keys() == other._buffers.keys()
            assert module._non_persistent_buffers_set == other._non_persistent_buffers_set
            assert getattr(module, "activation_relu_or_gelu", 1) == getattr(other, "activation_relu_or_gelu", 1)
        assert_close(dict(net.state_dict()), dict(before.state_dict()), **SAME)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got generator"):
        bl.to_bayesian(make_net().parameters())  # pyright: ignore[reportArgumentType]
