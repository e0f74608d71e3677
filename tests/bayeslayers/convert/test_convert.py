"""Conversion: the same network with posteriors beside its weights, its report, and the way back."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.per_example import EXACT, potential, squares_by_autograd, tracked_squares
from support.subclasses import SUBCLASSES, NormAct, make_input, name_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers import curvature
from bayeslayers.convert import conversion as convert
from bayeslayers.layers import POSTERIOR_SUFFIXES, FilterResponseNorm2d

SAME = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class OwnLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


class ReadsPast(nn.Module):
    """A module that reads the weight of its child, in a method that its forward calls."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.outer(self.project(x.to(self.outer.weight.dtype)))

    def project(self, x):
        return F.linear(x, self.inner.weight, self.inner.bias)


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def reasons(report: bl.ConversionReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.entries}


def converted(report: bl.ConversionReport) -> list[str]:
    return [entry.name for entry in report.entries if entry.status == "converted"]


LAYERS = [
    (nn.Linear(3, 4), (5, 2, 3)),
    (nn.Conv1d(2, 4, 3), (5, 2, 7)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False), (5, 2, 7, 7)),
    (nn.Conv3d(2, 4, 2), (5, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(2, 4, 3), (5, 2, 7)),
    (nn.ConvTranspose2d(2, 4, 3), (5, 2, 4, 4)),
    (nn.ConvTranspose3d(2, 4, 2), (5, 2, 3, 3, 3)),
    (nn.BatchNorm1d(4), (5, 4)),
    (nn.BatchNorm2d(4), (5, 4, 3, 3)),
    (nn.BatchNorm3d(4), (5, 4, 2, 2, 2)),
    (nn.GroupNorm(2, 4), (5, 4, 3)),
    (nn.LayerNorm((4, 3), bias=False), (5, 2, 4, 3)),
    (FilterResponseNorm2d(4), (5, 4, 3, 3)),
    (nn.Embedding(7, 3), (5, 4)),
]

per_layer = pytest.mark.parametrize(("layer", "shape"), [*LAYERS, *SUBCLASSES], ids=name_of)


@per_layer
def test_converted_layer_is_the_layer_with_a_posterior_beside_it(layer, shape):
    net, report = bl.to_bayesian(layer, prior_precision=3, init_precision=50)
    assert isinstance(net, bl.BayesianLayer) and isinstance(net, type(layer))
    assert sorted(converted(report)) == sorted(name for name, _ in layer.named_parameters())
    state = net.state_dict()
    assert_close({key: state[key] for key in layer.state_dict()}, dict(layer.state_dict()), **SAME)
    assert {key for key in state if key.endswith(POSTERIOR_SUFFIXES)} == state.keys() - layer.state_dict().keys()
    for site in bl.posterior(net):
        prior_mean = 1.0 if site.name == "weight" and "Norm" in type(layer).__name__ else 0.0
        assert_close(site.prior_mean, torch.tensor(prior_mean), **SAME)
        assert_close(site.prior_precision, torch.tensor(3.0), **SAME)
        assert_close(site.precision, torch.full_like(site.mean, 50), **SAME)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@per_layer
def test_outputs_are_the_same_bit_for_bit_there_and_back(layer, shape, training):
    layer = copy.deepcopy(layer).train(training)
    net, _ = bl.to_bayesian(layer)
    counterpart = bl.to_deterministic(net)
    assert type(counterpart) is type(layer)
    x = make_input(layer, shape)
    output = layer(x)
    assert_close((net(x), counterpart(x)), (output, output), **SAME)
    assert_close(dict(counterpart.state_dict()), dict(layer.state_dict()), **SAME)
    assert vars(counterpart).keys() == vars(layer).keys()


@per_layer
def test_converted_layer_computes_with_the_draw(layer, shape):
    net, _ = bl.to_bayesian(layer.eval(), init_precision=4)
    x, noise = make_input(layer, shape), {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}
    draw = {site.name: (site.mean + noise[site.name] / 2).detach() for site in bl.posterior(net)}
    if (padding := getattr(layer, "padding_idx", None)) is not None:
        draw["weight"][padding] = layer.weight[padding]  # the padding row is deterministic
    with bl.sampled(net, noise=noise):
        assert_close(net(x), functional_call(layer, draw, (x,)))
    assert_close(net(x), layer(x), **SAME)


REFUSED = [
    (nn.Embedding(5, 3, max_norm=1.0), "max_norm is on"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "computed from other tensors"),
    (OwnLSTM(3, 3), "the forward of OwnLSTM is its own"),
]


@pytest.mark.parametrize(("layer", "reason"), REFUSED, ids=name_of)
def test_what_has_no_exact_curvature_stays_with_a_reason(layer, reason):
    net, report = bl.to_bayesian(nn.Sequential(nn.Linear(3, 3), layer))
    assert converted(report) == ["0.weight", "0.bias"]
    assert type(net[1]) is type(layer)
    assert re.search(reason, "; ".join(reasons(report).values()))


def test_weights_read_past_their_layer_give_the_sample_and_take_their_curvature():
    torch.manual_seed(0)
    net, report = bl.to_bayesian(ReadsPast().double())
    assert report.coverage == 1
    x = torch.randn(4, 3, dtype=torch.float64)
    with bl.sampled(net):
        assert not torch.equal(net(x), bl.to_deterministic(net)(x))

    def loss(net, x):
        return potential(net(x))

    assert_close(tracked_squares(net, loss, x), squares_by_autograd(net, loss, x), **EXACT)


def test_attention_that_is_excluded_stays_and_is_trained():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.output = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)
            self.token = nn.Parameter(torch.zeros(1, 1, 4))

        def forward(self, x):
            x = x + self.token
            return self.output(self.attention(x, x, x)[0][:, 0])

    torch.manual_seed(0)
    net, report = bl.to_bayesian(Net(), include=["output", "*out_proj"])
    assert converted(report) == ["output.weight", "output.bias"]
    assert reasons(report)["attention.in_proj_weight"] == "not included"
    assert reasons(report)["attention.out_proj.weight"].startswith("MultiheadAttention reads it without calling")
    assert reasons(report)["token"] == "not included"
    net, report = bl.to_bayesian(Net(), exclude="attention")
    assert converted(report) == ["token", "output.weight", "output.bias"]
    before = copy.deepcopy(net.state_dict())
    optimizer = bl.VOGN(net, dataset_size=10)
    with optimizer.sampled():
        net(torch.randn(3, 5, 4)).square().mean().backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_uses_the_draws_in_eval_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ordinary = nn.TransformerEncoder(layer, 2).eval()
    net, report = bl.to_bayesian(ordinary, init_precision=10)
    assert report.coverage == 1
    x, mask = torch.randn(3, 5, 8), torch.arange(5) > torch.tensor([[4], [3], [2]])
    with torch.no_grad():
        for arguments in ({}, {"src_key_padding_mask": mask}):
            expected, output = ordinary(x, **arguments), net(x, **arguments)
            real = ~mask if arguments else torch.ones(3, 5, dtype=torch.bool)
            assert_close(output[real], expected[real], rtol=1e-5, atol=1e-5)
    assert (bl.predict(net, x, 2, likelihood=bl.Gaussian(1.0)).epistemic > 0).all()


def test_shared_layer_is_converted_once_and_shared():
    shared = nn.Linear(3, 3)
    net, report = bl.to_bayesian(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2)))
    assert net[0] is net[2]
    assert [site.name for site in bl.posterior(net)] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert reasons(report)["0.weight"] == "one layer in several places: 0, 2"
    assert [entry.numel for entry in report.entries] == [9, 3, 6, 2]


def test_tied_parameter_is_one_tensor_of_one_posterior():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7))
    net[2].weight = net[0].weight
    bayesian, report = bl.to_bayesian(net)
    assert report.coverage == 1
    assert "0.weight, 2.weight" in reasons(report)["0.weight"]
    assert bayesian[0].weight is bayesian[2].weight
    assert next(site.names for site in bl.posterior(bayesian)) == ("0.weight", "2.weight")
    assert "2.weight_precision" not in bayesian.state_dict()


def test_tied_parameter_of_a_layer_that_stays_stays_too():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7))
    net[2].weight = net[0].weight
    bayesian, report = bl.to_bayesian(net, exclude="2")
    assert converted(report) == ["1.weight", "1.bias"]
    assert [(entry.name, entry.status, entry.numel) for entry in report.entries if entry.status == "tied"] == [
        ("0.weight", "tied", 21)
    ]
    assert "in common with another" in reasons(report)["0.weight"]
    assert bayesian[0].weight is bayesian[2].weight


def test_input_is_left_as_it_is():
    net = make_net()
    before, kinds = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
    bayesian, _ = bl.to_bayesian(net)
    with torch.no_grad():
        for parameter in bayesian.parameters():
            parameter.add_(1)
    bayesian(torch.randn(5, 2, 4, 4))
    assert_close(dict(net.state_dict()), dict(before), **SAME)
    assert [type(module) for module in net.modules()] == kinds


def test_modes_dtype_and_frozen_parameters_are_kept():
    net = make_net().double()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    bayesian, report = bl.to_bayesian(net)
    assert [m.training for m in bayesian.modules()] == [m.training for m in net.modules()]
    assert {t.dtype for t in bayesian.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert [p.requires_grad for p in bayesian.parameters()] == [p.requires_grad for p in net.parameters()]
    assert not any(buffer.requires_grad for buffer in bayesian.buffers())
    assert reasons(report)["0.weight"] == "frozen"


def test_conversion_takes_place_where_the_network_is():
    bayesian, report = bl.to_bayesian(nn.Sequential(make_net(), NormAct(2)).to("meta"))
    assert {t.device.type for t in bayesian.state_dict().values()} == {"meta"}
    assert "1.weight" in converted(report)


def test_hooks_are_kept():
    calls = []
    net = make_net()
    net[0].register_forward_hook(lambda module, args, output: calls.append(module))
    net[4].register_forward_pre_hook(lambda module, args: calls.append(module))
    bayesian, _ = bl.to_bayesian(net)
    bayesian(torch.randn(5, 2, 4, 4))
    assert calls == [bayesian[0], bayesian[4]]


def test_layer_with_a_replaced_forward_stays():
    net = make_net()
    net[4].forward = lambda x: x
    _, report = bl.to_bayesian(net)
    assert reasons(report)["4.weight"] == "the forward of this Linear was replaced"


def test_bayesian_layers_keep_their_posterior():
    net = nn.Sequential(bl.BayesLinear(3, 3, init_precision=7), nn.Linear(3, 2))
    bayesian, report = bl.to_bayesian(net)
    assert_close(bayesian[0].weight_precision, torch.full((3, 3), 7.0), **SAME)
    assert (report.coverage, reasons(report)["0.weight"]) == (1, "was Bayesian before")


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (OwnLSTM(3, 3), {}, "none. 'weight_ih_l0': the forward of OwnLSTM is its own"),
        (nn.ReLU(), {}, "got none. no parameters"),
        (nn.Linear(3, 3), {"init_precision": 0}, "init_precision must be .* > 0, got 0"),
        (nn.Linear(3, 3), {"prior_precision": -1}, "prior_precision must be .* > 0, got -1"),
        (nn.Sequential(nn.LazyLinear(3)), {}, "shapes of its parameters, '0.weight' has none"),
    ],
    ids=["fused", "empty", "init", "prior", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_impossible_conversions_are_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        bl.to_bayesian(module, **arguments)


def test_a_rule_can_be_added_and_leads_back(monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2 + self.weight.sum() * 0

    class BayesDoubled(bl.BayesLinear, Doubled):
        def forward(self, x):
            return super().forward(x) * 2

    monkeypatch.setattr(convert, "_RULES", dict(convert._RULES))
    bl.register_rule(Doubled, BayesDoubled)
    net, report = bl.to_bayesian(nn.Sequential(Doubled(3, 2)))
    assert (type(net[0]), report.coverage) == (BayesDoubled, 1)
    assert type(bl.to_deterministic(net)[0]) is Doubled
    with pytest.raises(TypeError, match="BayesianLayer derived from Linear, got Doubled"):
        bl.register_rule(nn.Linear, Doubled)


def test_a_rule_for_what_cannot_be_converted_is_rejected(monkeypatch):
    class Forgetful(bl.BayesianLayer, nn.Linear):
        rule = curvature.LINEAR

    monkeypatch.setattr(convert, "_RULES", dict(convert._RULES))
    with pytest.raises(TypeError, match=r"with the forward of Linear\. Give it a forward of its own, as `return"):
        bl.register_rule(nn.Linear, Forgetful)
    with pytest.raises(TypeError, match="ordinary must be a class of layers, got Linear"):
        bl.register_rule(nn.Linear(2, 2), bl.BayesLinear)
    with pytest.raises(TypeError, match="bayesian must be a class of layers, got <class 'int'>"):
        bl.register_rule(nn.Linear, int)
    assert convert._RULES[nn.Linear] is bl.BayesLinear


def test_counterpart_of_a_layer_without_a_rule_is_refused():
    class Strange(bl.BayesLinear):
        pass

    with pytest.raises(TypeError, match="layer 'a' must be of a class with a rule, got Strange"):
        bl.to_deterministic(nn.ModuleDict({"a": Strange(2, 2)}))


def test_deterministic_counterpart_is_the_ordinary_network_with_the_means():
    torch.manual_seed(0)
    net, _ = bl.to_bayesian(make_net())
    optimizer = bl.VOGN(net, dataset_size=10, lr=1.0)
    with optimizer.sampled():
        net(torch.randn(5, 2, 4, 4)).square().mean().backward()
    optimizer.step()
    net.eval()
    counterpart, x = bl.to_deterministic(net), torch.randn(5, 2, 4, 4)
    assert not any(isinstance(module, bl.BayesianLayer) for module in counterpart.modules())
    for module, ordinary in zip(counterpart.modules(), make_net().modules(), strict=True):
        assert (type(module), vars(module).keys()) == (type(ordinary), vars(ordinary).keys())
    assert_close(counterpart(x), net(x), **SAME)
    with bl.sampled(net):
        assert_close(bl.to_deterministic(net)(x), counterpart(x), **SAME)


def test_a_posterior_of_an_ordinary_layer_is_kept():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    bl.IVON(net[0], dataset_size=50, hess_init=0.5)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    converted, _ = bl.to_bayesian(net)
    assert_close({name: converted.state_dict()[name] for name in expected}, expected, rtol=0, atol=0)
    assert converted[2].weight_precision.unique().tolist() == [1e3]
