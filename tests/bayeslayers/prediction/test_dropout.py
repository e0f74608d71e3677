"""The method "dropout": whatever a network drops is found and drawn, or the network is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.prediction import randomness

N = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape):
    return 2 * torch.randn(*shape, generator=generator())


class Functional(nn.Module):
    """As many scripts write it: a module that does nothing beside a function that does."""

    def __init__(self):
        super().__init__()
        self.first, self.none, self.last = nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 3)

    def drop(self, x):
        return F.dropout(x, 0.5, training=self.training)

    def forward(self, x):
        return 3 * self.last(self.none(self.drop(F.relu(self.first(x)))))


class Alpha(Functional):
    def drop(self, x):
        return F.alpha_dropout(x, 0.3, training=self.training)


class WithoutFlag(Functional):
    """Guards its own noise, which no function of torch's knows as dropout."""

    def drop(self, x):
        return x * torch.rand_like(x).gt(0.5) * 2 if self.training else x


class OfWeights(Functional):
    """One mask for all examples of a batch."""

    def drop(self, x):
        return F.linear(x, F.dropout(torch.eye(8, device=x.device), 0.5, training=self.training))


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False):
        super().__init__()
        self.inner, self.head, self.packed = kind(8, 6, 3, dropout=0.5, batch_first=True), nn.Linear(6, 3), packed

    def forward(self, x):
        if not self.packed:
            return 4 * self.head(self.inner(x)[0][:, -1])
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        return 4 * self.head(self.inner(packed)[1][0][-1])


class Attention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 3)
        self.need_weights = need_weights

    def forward(self, x):
        return 10 * self.head(self.inner(x, x, x, need_weights=self.need_weights)[0].mean(1))


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        p = 0.5 if self.training else 0.0
        return 3 * self.head(F.scaled_dot_product_attention(x, x, x, dropout_p=p, is_causal=True).mean(1))


class Pooled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x):
        return 3 * self.head(self.body(x).mean(1))


class Residual(nn.Module):
    def __init__(self, path):
        super().__init__()
        self.inner, self.path = nn.Linear(8, 8), path

    def forward(self, x):
        return x + self.path(3 * self.inner(x))


def transformer():
    return Pooled(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.4, batch_first=True), 2))


def drop_path():
    return Pooled(Residual(pytest.importorskip("timm.layers").DropPath(0.4)))


def stochastic_depth(mode):
    return Pooled(Residual(pytest.importorskip("torchvision.ops").StochasticDepth(0.4, mode)))


NETWORKS = {
    "module": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)),
    "functional": Functional,
    "alpha": Alpha,
    "alpha module": lambda: nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.3), nn.Linear(8, 3)),
    "its own": WithoutFlag,
    "of weights": OfWeights,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "packed": lambda: Recurrent(nn.LSTM, packed=True),
    "attention": lambda: Attention(False),
    "attention weights": lambda: Attention(True),
    "scaled dot product": ScaledDotProduct,
    "transformer": transformer,
    "drop path": drop_path,
    "stochastic depth": lambda: stochastic_depth("row"),
    "stochastic depth of a batch": lambda: stochastic_depth("batch"),
}
FLAT = ("module", "functional", "alpha", "alpha module", "its own", "of weights")


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_those_of_training_mode(name):
    torch.manual_seed(0)
    net, num_samples = NETWORKS[name]().eval(), 1000
    x = inputs(N, 8) if name in FLAT else inputs(N, 5, 8)
    found = bl.predict(net, x, num_samples, method="dropout", generator=generator())
    assert not any(module.training or module._forward_hooks for module in net.modules())
    with torch.no_grad():  # none of these modules but those that drop something knows training mode
        net.train()
        draws = torch.stack([net(x).softmax(1) for _ in range(num_samples)])
    error = (found.standard_error.square() + draws.var(0) / num_samples).sqrt()
    assert ((found.mean - draws.mean(0)) / error).abs().max() < 5
    spread = draws.std(0) / math.sqrt(num_samples)
    assert_close(found.standard_error.mean(), spread.mean(), rtol=0.15, atol=0)
    assert float(spread.mean()) > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_follow_their_generator(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    x, state = inputs(N, 8) if name in FLAT else inputs(N, 5, 8), torch.get_rng_state()
    first, second, other = (
        bl.predict(net, x, 12, method="dropout", generator=generator(seed)).mean for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())  # none of them drew from the default one


@pytest.mark.parametrize("name", ["of weights", "stochastic depth of a batch"])
def test_draws_at_once_do_not_share_a_mask_of_the_batch(name):
    torch.manual_seed(0)
    net, x = NETWORKS[name](), inputs(N, 8) if name in FLAT else inputs(N, 5, 8)
    one, several = (
        bl.predict(net, x, 512, method="dropout", sample_chunk=chunk, generator=generator()) for chunk in (1, 32)
    )
    assert_close(several.mean, one.mean)
    assert_close(several.standard_error, one.standard_error)


def test_batch_norm_and_weights_stay_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(
        bl.BayesLinear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), bl.BayesBatchNorm1d(8), nn.Linear(8, 3)
    )
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = inputs(N, 8)
    found = bl.predict(net, x, 400, method="dropout", generator=generator())
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in net.modules())
    with torch.no_grad():
        net.eval()[2].train()
        draws = torch.stack([net(x).softmax(1) for _ in range(400)])
    error = (found.standard_error.square() + draws.var(0) / 400).sqrt()
    assert ((found.mean - draws.mean(0)) / error).abs().max() < 5


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_channels_are_dropped_whole(kind):
    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = kind(0.5)

        def forward(self, x):
            return self.drop(x).flatten(1)

    dimensions = {nn.Dropout: 1, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}[kind]
    x = torch.ones(2, 3, *[4] * dimensions)
    found = bl.predict(Units(), x, 64, method="dropout", likelihood=bl.Gaussian(1.0), generator=generator())
    each = found.epistemic.view(2, 3, -1)
    assert float(each.min()) > 0.8  # of a scaled Bernoulli variable the variance is 1
    assert bool((each == each[..., :1]).all()) == (kind is not nn.Dropout)


def test_what_drops_nothing_is_refused():
    x = inputs(N, 8)
    for net in (nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.0)), nn.Sequential(bl.BayesLinear(8, 3))):
        with pytest.raises(ValueError, match=r"must have nn\.Dropout modules for method 'dropout', got none"):
            bl.predict(net, x, 4, method="dropout")


def test_every_unit_dropped_is_a_network_without_them():
    net = nn.Sequential(nn.Linear(8, 3), nn.Dropout(1.0))
    assert_close(bl.predict(net, inputs(N, 8), 4, method="dropout").probs, torch.full((N, 3), 1 / 3))


def test_weights_stay_at_their_means():
    net, x = nn.Sequential(bl.BayesLinear(8, 3), nn.Dropout(1e-12)), inputs(N, 8)
    net[0].weight_precision.fill_(1e-6)
    assert_close(bl.predict(net, x, 4, method="dropout").probs, net[0](x).detach().softmax(1))


class WithAuxiliary(Functional):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


class WithStatistics(Functional):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def drop(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return super().drop(x - self.mean)


class NeedsTargets(Functional):
    def forward(self, x):
        if self.training:
            raise ValueError("targets must not be None\nin training mode")
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (WithAuxiliary, r"must not change what the model returns, got tuple instead of \(2, 3\)"),
        (WithStatistics, "must leave buffer 'mean' unchanged"),
        (NeedsTargets, "but failed there: ValueError: targets must not be None in training mode"),
    ],
)
def test_a_training_mode_that_does_more_is_refused(net, message):
    net = net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        bl.predict(net, inputs(N, 8), 4, method="dropout")
    assert "\n" not in str(caught.value)
    assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_an_auxiliary_output_of_a_module_that_drops_nothing_stays_off():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()

        def forward(self, x):
            return (self.inner(x), x) if self.training else self.inner(x)

    prediction = bl.predict(Outer().train(), inputs(N, 8), 16, method="dropout")
    assert float(prediction.epistemic.mean()) > 1e-3


def test_dropout_that_is_always_off_stays_off():
    class Off(Functional):
        def drop(self, x):
            return F.dropout(x, 0.5, training=False)

    with pytest.raises(ValueError, match="all samples would be equal"):
        bl.predict(Off(), inputs(N, 8), 4, method="dropout")


@pytest.mark.parametrize("mask", ["causal", "bool", "float", "groups"])
def test_a_fused_attention_is_that_of_its_parts(mask):
    rule = randomness._attention
    query = torch.randn(2, 4, 5, 8, generator=generator(), dtype=torch.float64)
    heads = query[:, :2] if mask == "groups" else query
    bias = {"bool": torch.ones(5, 5).tril().bool(), "float": torch.randn(5, 5).double()}.get(mask)
    given = {"query": query, "key": heads, "value": heads, "attn_bias": bias, "is_causal": mask == "causal"}
    fused = torch.ops.aten._scaled_dot_product_efficient_attention.default
    expected = F.scaled_dot_product_attention(
        query, heads, heads, bias, is_causal=mask == "causal", enable_gqa=mask == "groups"
    )
    kept = rule(fused, given | {"dropout_p": 0.0, "scale": None}, generator())
    assert len(kept) == len(fused._schema.returns)
    assert_close(kept[0], expected)
    dropped = [rule(fused, given | {"dropout_p": 0.3, "scale": None}, generator(seed))[0] for seed in range(400)]
    error = torch.stack(dropped).std(0) / 20
    assert float(((torch.stack(dropped).mean(0) - expected) / error.clamp_min(1e-9)).abs().max()) < 5
