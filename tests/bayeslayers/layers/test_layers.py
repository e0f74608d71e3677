"""Bayesian layers as torch.nn layers: constructors, names, numbers and state_dicts are the counterpart's."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.layers import DEFAULT_INIT_PRECISION, DEFAULT_PRIOR_PRECISION, POSTERIOR_SUFFIXES

SAME = {"rtol": 0, "atol": 0}

# (kind of torch.nn layer, arguments, keyword arguments, shape of the input)
LAYERS = [
    ("Linear", (3, 4), {}, (5, 2, 3)),
    ("Linear", (3, 4), {"bias": False}, (5, 3)),
    ("Conv1d", (2, 4, 3), {"padding": "same", "groups": 2}, (5, 2, 7)),
    ("Conv2d", (2, 4, 3), {"stride": 2, "padding": 1, "padding_mode": "reflect"}, (5, 2, 7, 7)),
    ("Conv3d", (2, 4, 2), {"dilation": 2, "bias": False}, (5, 2, 4, 4, 4)),
    ("ConvTranspose1d", (2, 4, 3), {"stride": 2, "output_padding": 1}, (5, 2, 7)),
    ("ConvTranspose2d", (2, 4, 3), {"groups": 2, "dilation": 2}, (5, 2, 4, 4)),
    ("ConvTranspose3d", (2, 4, 2), {"padding": 1}, (5, 2, 3, 3, 3)),
    ("Embedding", (7, 3), {"padding_idx": -2}, (5, 4)),
    ("LayerNorm", ((4, 3),), {"eps": 0.1}, (5, 2, 4, 3)),
    ("LayerNorm", (3,), {"bias": False}, (5, 3)),
    ("LayerNorm", (3,), {"elementwise_affine": False}, (5, 3)),
    ("GroupNorm", (2, 4), {"eps": 0.1}, (5, 4, 3)),
    ("GroupNorm", (2, 4), {"affine": False}, (5, 4, 3)),
    ("BatchNorm1d", (4,), {}, (5, 4)),
    ("BatchNorm1d", (4,), {"momentum": None}, (5, 4, 3)),
    ("BatchNorm2d", (4,), {"track_running_stats": False}, (5, 4, 3, 3)),
    ("BatchNorm2d", (4,), {"affine": False, "momentum": 0.3}, (5, 4, 3, 3)),
    ("BatchNorm3d", (4,), {"eps": 0.1}, (5, 4, 2, 2, 2)),
]
per_layer = pytest.mark.parametrize(
    ("kind", "args", "kwargs", "shape"), LAYERS, ids=lambda value: str(value).replace(" ", "")
)


def bayesian(kind: str, *args, **kwargs) -> bl.BayesianLayer:
    return getattr(bl, "Bayes" + kind)(*args, **kwargs)


def make_counterparts(kind: str, args: tuple, kwargs: dict) -> tuple[bl.BayesianLayer, nn.Module]:
    """Return a Bayesian layer and its torch.nn counterpart, initialised from the same seed."""
    torch.manual_seed(0)
    layer = bayesian(kind, *args, **kwargs)
    torch.manual_seed(0)
    return layer, getattr(nn, kind)(*args, **kwargs)


def make_input(kind: str, shape: tuple) -> torch.Tensor:
    return torch.randint(7, shape) if kind == "Embedding" else torch.randn(shape)


def make_net() -> nn.Sequential:
    return nn.Sequential(
        bl.BayesConv2d(2, 3, 3), bl.BayesBatchNorm2d(3), nn.Tanh(), nn.Flatten(), bl.BayesLinear(12, 2)
    )  # fmt: skip


def make_ordinary_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def randomised(net: nn.Module) -> nn.Module:
    """Give every tensor of the state its own values, precisions included."""
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) + 1 if tensor.is_floating_point() else tensor)
    return net


@per_layer
def test_state_is_the_counterparts_with_a_posterior_beside_it(kind, args, kwargs, shape):
    layer, counterpart = make_counterparts(kind, args, kwargs)
    state = layer.state_dict()
    own = {name + suffix for name, _ in counterpart.named_parameters() for suffix in POSTERIOR_SUFFIXES}
    assert set(state) == set(counterpart.state_dict()) | own
    assert_close({key: state[key] for key in counterpart.state_dict()}, dict(counterpart.state_dict()), **SAME)
    for name, parameter in counterpart.named_parameters():
        prior_mean = torch.tensor(1.0 if name == "weight" and "Norm" in kind else 0.0)
        precision = torch.full_like(parameter, DEFAULT_INIT_PRECISION)
        values = (precision, prior_mean, torch.tensor(DEFAULT_PRIOR_PRECISION))
        assert_close(tuple(state[name + suffix] for suffix in POSTERIOR_SUFFIXES), values, **SAME)
    assert layer.extra_repr() == counterpart.extra_repr()
    assert isinstance(layer, type(counterpart))


@per_layer
def test_constructor_takes_dtype_and_own_arguments(kind, args, kwargs, shape):
    layer = bayesian(kind, *args, **kwargs, dtype=torch.float64, prior_precision=3.0, init_precision=50.0)
    for site in bl.posterior(layer):
        assert_close(site.precision, torch.full_like(site.mean, 50), **SAME)
        assert_close(site.prior_precision, torch.tensor(3, dtype=torch.float64), **SAME)


@per_layer
def test_constructor_takes_the_counterparts_arguments_by_position(kind, args, kwargs, shape):
    parameters = list(inspect.signature(getattr(nn, kind)).parameters.values())[len(args) :]
    rest = [kwargs.get(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = [*args, *rest]
    assert bayesian(kind, *given).extra_repr() == getattr(nn, kind)(*given).extra_repr()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@per_layer
def test_plain_call_is_the_counterparts_bit_for_bit(kind, args, kwargs, shape, training):
    layer, counterpart = make_counterparts(kind, args, kwargs)
    layer.train(training), counterpart.train(training)
    for _ in range(3):
        x = make_input(kind, shape)
        assert_close(layer(x), counterpart(x), **SAME)
    state = layer.state_dict()
    assert_close({key: state[key] for key in counterpart.state_dict()}, dict(counterpart.state_dict()), **SAME)


def test_transposed_convolution_takes_an_output_size():
    layer, counterpart = make_counterparts("ConvTranspose2d", (2, 4, 3), {"stride": 2})
    x = torch.randn(5, 2, 4, 4)
    assert_close(layer(x, output_size=[10, 9]), counterpart(x, output_size=[10, 9]), **SAME)
    with bl.tracked(layer):
        assert_close(layer(x, output_size=[10, 9]), counterpart(x, output_size=[10, 9]))


@per_layer
def test_state_survives_a_safetensors_file(kind, args, kwargs, shape, tmp_path):
    layer = randomised(bayesian(kind, *args, **kwargs))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    loaded = bayesian(kind, *args, **kwargs)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_close(dict(loaded.state_dict()), dict(layer.state_dict()), **SAME)


def test_ordinary_checkpoint_loads_as_means_and_keeps_precisions():
    net, counterpart = randomised(make_net()), make_ordinary_net()
    before = copy.deepcopy(net.state_dict())
    net.load_state_dict(counterpart.state_dict(), strict=True)
    assert_close(dict(net.state_dict()), {**before, **counterpart.state_dict()}, **SAME)


@pytest.mark.parametrize("key", ["0.weight_precision", "1.bias_prior_mean", "4.bias_prior_precision"])
def test_incomplete_posterior_is_refused(key):
    net = make_net()
    state = net.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        net.load_state_dict(state)


@pytest.mark.parametrize("key", ["0.weight", "1.running_var"])
def test_incomplete_ordinary_checkpoint_is_refused(key):
    state = make_ordinary_net().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        make_net().load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("to_tensor", [True, False], ids=["tensor_into_scalar", "scalar_into_tensor"])
def test_priors_load_in_the_shape_they_come_in(to_tensor, assign):
    scalar, tensor = make_net(), make_net()
    for site in bl.posterior(tensor):  # as in continual learning
        for suffix in ("_prior_mean", "_prior_precision"):
            site.module.register_buffer(site.key + suffix, torch.rand_like(site.mean.detach()))
    source, target = (tensor, scalar) if to_tensor else (scalar, tensor)
    target.load_state_dict(randomised(source).state_dict(), assign=assign)
    assert_close(dict(target.state_dict()), dict(source.state_dict()), **SAME)
    assert_close(bl.kl_divergence(target), bl.kl_divergence(source), **SAME)


def test_prior_of_a_wrong_shape_is_refused():
    net = make_net()
    state = {**net.state_dict(), "4.weight_prior_mean": torch.zeros(5)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 4\.weight_prior_mean"):
        net.load_state_dict(state)


def test_posterior_loads_into_the_ordinary_counterpart():
    net, counterpart = randomised(make_net()), make_ordinary_net()
    report = counterpart.load_state_dict(net.state_dict(), strict=False)
    assert report.missing_keys == []
    assert all(key.endswith(POSTERIOR_SUFFIXES) for key in report.unexpected_keys)
    x = torch.randn(5, 2, 4, 4)
    assert_close(net(x), counterpart(x), **SAME)


def test_moving_the_net_moves_its_posterior():
    net = make_net().to(torch.float64)
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float64}
    with bl.sampled(net), bl.tracked(net) as tracker:
        net(torch.randn(5, 2, 4, 4, dtype=torch.float64)).sum().backward()
    assert {leaf.grad.dtype for leaf in tracker.leaves.values()} == {torch.float64}


def test_deepcopy_is_equal_and_independent():
    net = randomised(make_net()).eval()
    x = torch.randn(5, 2, 4, 4)
    with bl.sampled(net), bl.tracked(net):
        net(x).sum().backward()
    counterpart, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    assert_close(dict(counterpart.state_dict()), dict(before), **SAME)
    randomised(counterpart)
    assert_close(dict(net.state_dict()), dict(before), **SAME)


def test_vmap_over_stacked_draws_is_the_loop_over_draws():
    net, x = make_net().eval(), torch.randn(5, 2, 4, 4)
    sites = list(bl.posterior(net))
    noise = {site.name: torch.randn(6, *site.mean.shape) for site in sites}
    draws = {site.name: (site.mean + noise[site.name] / site.precision.sqrt()).detach() for site in sites}
    outputs = vmap(lambda weights: functional_call(net, weights, (x,)))(draws)
    for i, output in enumerate(outputs):
        with bl.sampled(net, noise={name: e[i] for name, e in noise.items()}):
            assert_close(output, net(x))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["prior_precision", "init_precision"])
def test_bad_precision_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        bl.BayesLinear(2, 2, **{name: value})


@pytest.mark.parametrize(("option", "value"), [("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)])
def test_embedding_refuses_options_that_have_no_posterior(option, value):
    with pytest.raises(ValueError, match=f"{option} must be off in BayesEmbedding, got {value}"):
        bl.BayesEmbedding(5, 3, **{option: value})


def test_padding_changed_after_construction_is_the_one_computed_with():
    layer, x = bl.BayesConv2d(1, 1, 3, padding=1), torch.randn(2, 1, 8, 8)
    layer.dilation = layer.padding = (2, 2)
    expected = layer(x)
    with bl.tracked(layer):
        assert_close(layer(x), expected)
