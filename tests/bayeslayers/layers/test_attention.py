"""Multi-head attention: torch's own outputs at the mean, draws on every path, and exact curvature of every tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from support.steps import assert_every_tensor_moves
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Attention(nn.Module):
    """Attention that runs `uses` times, to itself or to other rows, with the masks that `masks` names."""

    def __init__(self, uses=1, cross=False, masks="", need_weights=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
        if cross:
            self.key, self.value = nn.Linear(4, self.attention.kdim), nn.Linear(4, self.attention.vdim)
        self.norm, self.head = nn.BatchNorm1d(4).eval(), nn.Linear(4, 2)
        self.uses, self.cross, self.masks, self.need_weights = uses, cross, masks, need_weights

    def forward(self, x, lengths):
        total = 0
        for use in range(self.uses):
            q = k = v = x * (use + 1)
            if self.cross:
                k, v = self.key(x[:, :3]), self.value(x[:, :3])
            masks = {}
            if "padding" in self.masks:
                masks["key_padding_mask"] = torch.arange(k.shape[1]) >= lengths[:, None]
            if "causal" in self.masks:
                masks["attn_mask"] = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
            if "heads" in self.masks:
                masks["attn_mask"] = (q @ k.mT).sin().repeat_interleave(2, 0)
            rows = (q, k, v) if self.attention.batch_first else [each.transpose(0, 1) for each in (q, k, v)]
            y, weights = self.attention(*rows, need_weights=self.need_weights, **masks)
            y = y if self.attention.batch_first else y.transpose(0, 1)
            total = total + self.head(self.norm(y.sin().sum(1)))
            total = total + (0 if weights is None else weights.sin().sum((1, 2))[:, None])
        return total


CASES = [
    {},
    {"masks": "padding causal", "need_weights": True},
    {"cross": True, "kdim": 3, "vdim": 5, "masks": "padding", "uses": 2},
    {"cross": True, "masks": "heads", "uses": 4, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True, "masks": "padding causal", "uses": 7},
    {"batch_first": False, "masks": "causal", "uses": 2, "need_weights": True},
]
per_case = pytest.mark.parametrize("options", CASES, ids=str)
LENGTHS = torch.tensor([1, 3, 2, 3, 1])


def loss(net, x, lengths):
    return potential(net(x, lengths))


def make_net(**options) -> nn.Module:
    return bayesian(Attention(**options))


def make_input() -> torch.Tensor:
    return torch.randn(5, 4, 4, **F64)


@per_case
def test_outputs_and_gradients_are_those_of_torch(options):
    net, x = make_net(**options), make_input()
    ordinary = bl.to_deterministic(net)
    assert type(ordinary.attention) is nn.MultiheadAttention
    expected = ordinary(x, LENGTHS)
    assert_close(net(x, LENGTHS), expected, **SAME)
    grads = torch.autograd.grad(potential(expected), list(ordinary.parameters()))
    with bl.tracked(net):
        output = net(x, LENGTHS)
        assert_close(output, expected, **CLOSE)
        assert_close(torch.autograd.grad(potential(output), list(net.parameters())), grads, **EXACT)


@per_case
def test_squares_are_those_of_autograd(options):
    net, x = make_net(**options), make_input()
    assert_close(tracked_squares(net, loss, x, LENGTHS), squares_by_autograd(net, loss, x, LENGTHS), **EXACT)


def test_squares_add_up_over_parts_of_a_batch():
    net, x = make_net(cross=True, uses=2, masks="padding"), make_input()
    expected = squares_by_autograd(net, loss, x, LENGTHS)
    assert_close(tracked_squares(net, loss, x, LENGTHS, parts=2), expected, **EXACT)


def test_self_attention_and_cross_attention_of_one_layer_add_up():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.attention(y, x[:, :2], x[:, :2], need_weights=False)[0]

    net, x = bayesian(Both()), make_input()

    def of_output(net, x):
        return potential(net(x))

    assert_close(tracked_squares(net, of_output, x), squares_by_autograd(net, of_output, x), **EXACT)


@pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])
def test_samples_are_used_and_the_output_projection_draws_as_it_is_asked(estimator):
    layer, x = bl.BayesMultiheadAttention(4, 2, batch_first=True, init_precision=10), torch.randn(3, 5, 4)
    with bl.sampled(layer, estimator=estimator):
        drawn = layer(x, x, x)[0]
    assert not torch.equal(drawn, layer(x, x, x)[0])
    with torch.no_grad():
        for name, precision in layer.named_buffers():
            if name.endswith("_precision") and "out_proj" not in name and "prior" not in name:
                precision.fill_(1e12)
    with bl.sampled(layer, estimator=estimator):
        assert (layer(x, x, x)[0] - layer(x, x, x)[0]).abs().max() < 10
        assert not torch.allclose(layer(x, x, x)[0], bl.to_deterministic(layer)(x, x, x)[0], atol=1e-3)


def test_a_sample_is_what_torch_computes_with_its_weights_also_under_vmap():
    net, x = make_net(cross=True, masks="padding causal").float(), make_input().float()
    noise = {site.name: torch.randn_like(site.mean) for site in bl.posterior(net)}
    drawn = {site.name: (site.mean + noise[site.name] * site.deviation).detach() for site in bl.posterior(net)}
    with bl.sampled(net, noise=noise):
        assert_close(net(x, LENGTHS), functional_call(bl.to_deterministic(net), drawn, (x, LENGTHS)))
    batch = bl.Inputs(x, LENGTHS)
    one, several = (
        bl.predict(net, batch, 4, generator=torch.Generator().manual_seed(0), sample_chunk=chunk) for chunk in (1, 4)
    )
    assert_close(several.probs, one.probs)


class TestFastPath:
    """torch's encoders read the weights of their layers in one fused op, in eval mode and without gradients."""

    def test_of_a_layer_put_into_torchs_encoder(self):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        ordinary = copy.deepcopy(encoder)
        attention = bl.BayesMultiheadAttention(8, 2, batch_first=True, init_precision=10).eval()
        attention.load_state_dict(encoder.self_attn.state_dict())
        encoder.self_attn, x = attention, torch.randn(3, 5, 8)
        with torch.no_grad():
            assert_close(encoder(x), ordinary(x), rtol=1e-5, atol=1e-5)
            with bl.sampled(encoder):
                assert (encoder(x) - ordinary(x)).abs().max() > 0.01

    def test_nested_tensors_are_refused(self):
        layer = bl.BayesMultiheadAttention(4, 2, batch_first=True)
        x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
        with pytest.raises(ValueError, match="query must not be nested in a BayesMultiheadAttention"):
            layer(x, x, x)

    def test_every_uncertain_tensor_alone_reaches_the_prediction(self):
        torch.manual_seed(0)
        net = bl.to_bayesian(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())[0]
        x = torch.randn(3, 5, 8)
        for chosen in bl.posterior(net):
            for site in bl.posterior(net):
                site.precision.fill_(1.0 if site is chosen or site.name == chosen.name else 1e14)
            prediction = bl.predict(net, x, 4, likelihood=bl.Gaussian(1.0))
            if chosen.name != "self_attn.in_proj_bias":  # of which the keys' third changes nothing
                assert prediction.epistemic.max() > 1e-4, chosen.name


def test_a_layer_built_directly_has_the_names_and_the_start_of_torchs():
    torch.manual_seed(0)
    layer = bl.BayesMultiheadAttention(4, 2, kdim=3, vdim=5, prior_precision=7, init_precision=9)
    torch.manual_seed(0)
    ordinary = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert dict(layer.named_parameters()).keys() == dict(ordinary.named_parameters()).keys()
    assert_close(dict(layer.named_parameters()), dict(ordinary.named_parameters()), **SAME)
    assert {float(site.precision.max()) for site in bl.posterior(layer)} == {9.0}
    assert {float(site.prior_precision) for site in bl.posterior(layer)} == {7.0}
    layer.load_state_dict(ordinary.state_dict())
    assert type(bl.to_deterministic(layer)) is nn.MultiheadAttention


def test_a_single_example_may_come_without_its_dimension():
    layer, x = bl.BayesMultiheadAttention(4, 2).double(), torch.randn(5, 4, **F64)
    with bl.tracked(layer):
        found = layer(x, x, x)
    assert_close(found, layer(x, x, x), **CLOSE)


def test_is_causal_needs_its_mask():
    layer, x = bl.BayesMultiheadAttention(4, 2), torch.randn(5, 3, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="attn_mask"), bl.tracked(layer):
            layer(x, x, x, is_causal=True)
        with pytest.raises(RuntimeError, match="attn_mask"):
            layer(x, x, x, is_causal=True)


class TestTraining:
    def make(self) -> tuple[nn.Module, bl.Inputs, torch.Tensor]:
        torch.manual_seed(0)
        net = Attention(masks="padding causal", add_bias_kv=True, dropout=0.1)
        return net, bl.Inputs(torch.randn(5, 4, 4), LENGTHS), torch.tensor([0, 1, 1, 0, 1])

    @pytest.mark.parametrize(
        ("method", "options"),
        [(bl.VOGN, {"num_samples": 2}), (bl.VOGN, {"curvature_fraction": 0.5}), (bl.IVON, {}), (bl.KFAC, {})],
        ids=["vogn", "fraction", "ivon", "kfac"],
    )
    def test_every_tensor_and_its_precision_move(self, method, options):
        assert_every_tensor_moves(*self.make(), method, **options)

    def test_a_posterior_is_saved_and_loaded(self, tmp_path):
        net, batch, _ = self.make()
        optimizer = bl.VOGN(net, dataset_size=20)
        with optimizer.sampled():
            net(*batch.args).square().mean().backward()
        optimizer.step()
        bl.save_posterior(net, tmp_path)
        other = bl.to_bayesian(self.make()[0])[0]
        bl.load_posterior(tmp_path, other)
        assert_close(other.state_dict(), net.state_dict(), **SAME)

    def test_the_report_says_what_is_diagonal_and_conversion_in_place_keeps_the_modules(self):
        net = self.make()[0]
        projection = net.attention.out_proj
        assert type(projection) is NonDynamicallyQuantizableLinear
        _, report = bl.to_bayesian(net, inplace=True)
        assert net.attention.out_proj is projection and isinstance(projection, bl.BayesLinear)
        reasons = {entry.name: entry.reason for entry in report.entries}
        assert reasons["attention.in_proj_weight"] == "diagonal under K-FAC" and reasons["head.weight"] == ""

    def test_a_program_of_fixed_samples_can_be_exported(self):
        net = bl.to_bayesian(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()))[0]
        x = torch.randn(3, 5, 8)
        program = bl.to_exported(net.eval(), x, 2, generator=torch.Generator().manual_seed(0)).module()
        expected = bl.predict(net, x, 2, generator=torch.Generator().manual_seed(0))
        assert_close(program(x)[0], expected.probs, rtol=1e-4, atol=1e-6)
