"""IVON against its package and closed-form posteriors, on parameters of any module."""

from __future__ import annotations

import copy
import io
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.layers import attach_posterior
from zoo.registry import _BUILDERS

SAME = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}
ESTIMATORS = ["price", "gradsq"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """A vision transformer in small: a class token and positions of its own, and fused attention."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.ParameterList([torch.randn(1, 3, 4)])
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x.unflatten(1, (2, 4))], 1)
        return self.head(self.encoder(tokens + self.positions[0])[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(6, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        last = self.lstm(x.unflatten(1, (2, 4)))[0].mean(1)
        return self.head(self.cell(last, self.cell(last)))


class Tied(nn.Module):
    """Weights that an embedding and the output share, a parametrized layer, and a Bayesian one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 8)
        self.output = nn.Linear(8, 2)
        self.output.weight = self.table.weight
        self.hidden = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.norm = bl.BayesLayerNorm(8)

    def forward(self, x):
        return self.output(self.norm(torch.tanh(self.hidden(x + self.table((x[:, 0] > 0).long())))))


NETWORKS = [Attention, Recurrent, Tied]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def make_batch(seed: int = 0, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 8, generator=seeded(seed), **F64), torch.arange(n) % 2


def make_optimizer(net: nn.Module, **kwargs) -> bl.IVON:
    return bl.IVON(net, **{"dataset_size": 50, "beta2": 0.9, "hess_init": 0.5, "generator": seeded(), **kwargs})


def make_noise(net: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = seeded(seed)
    return {s.name: torch.randn(s.mean.shape, generator=generator, **F64) for s in bl.posterior(net)}


def train(net: nn.Module, optimizer: bl.IVON, steps) -> None:
    for step in steps:
        x, y = make_batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def trained(kind: type[nn.Module]) -> nn.Module:
    net = make(kind)
    train(net, make_optimizer(net), range(3))
    return net.eval()


def state_of(net: nn.Module, optimizer: bl.IVON | None = None) -> dict[str, torch.Tensor]:
    """Return a copy of the posterior, and of the optimizer's tensors."""
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    for index, state in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.02, "beta1": 0.7, "beta2": 0.97, "hess_init": 0.25, "weight_decay": 0.05, "rescale_lr": False},
    {"lr": 0.4, "beta1": 0.0, "beta2": 0.99, "hess_init": 0.25, "weight_decay": 0.05, "clip_radius": 0.2},
]


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "plain_lr", "clipped"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_is_ivon_opt_for_50_steps(estimator, settings, num_samples):
    ivon = pytest.importorskip("ivon")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    baseline = copy.deepcopy(net)
    optimizer = bl.IVON(net, 50, estimator=estimator, **settings)
    other = ivon.IVON(baseline.parameters(), ess=50, **{"lr": 0.1, **settings}, hess_approx=estimator)
    (group,) = other.param_groups
    shapes = {name: parameter.shape for name, parameter in baseline.named_parameters()}
    for step in range(50):
        x, y = (torch.randn(6, size, generator=seeded(step), **F64) for size in (3, 2))
        for _ in range(num_samples):
            mean = nn.utils.parameters_to_vector(baseline.parameters()).detach()
            with other.sampled_params(train=True):
                offset = nn.utils.parameters_to_vector(baseline.parameters()).detach() - mean
                other.zero_grad()
                F.mse_loss(baseline(x), y).backward()
            values = offset * (group["ess"] * (group["hess"] + group["weight_decay"])).sqrt()
            parts = values.split([shape.numel() for shape in shapes.values()])
            with optimizer.sampled({k: v.view(s) for (k, s), v in zip(shapes.items(), parts, strict=True)}):
                F.mse_loss(net(x), y).backward()
        other.step()
        optimizer.step()
        assert_close(dict(net.named_parameters()), dict(baseline.named_parameters()), rtol=1e-9, atol=1e-9)
        precision = torch.cat([site.precision.flatten() for site in bl.posterior(net)])
        assert_close(precision, 50 * (group["hess"] + group["weight_decay"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("layer", [nn.Linear, bl.BayesLinear])
def test_price_reaches_the_exact_mean_field_posterior(layer, temperature):
    """Linear regression with unit noise: precision diag(X'X)/T + delta, mean that of ridge regression.

    Noise of +-sqrt(3) along each axis has the covariance of N(0, I): the expectation is exact.
    """
    torch.manual_seed(0)
    x = torch.randn(20, 3, **F64) * torch.tensor([1.0, 2.0, 0.5], **F64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], **F64) + torch.randn(20, 1, **F64)
    model = layer(3, 1, bias=False).double()
    ess = len(x) / temperature
    optimizer = bl.IVON(
        model, len(x), lr=0.5, beta1=0.0, beta2=0.5, weight_decay=4 / ess, temperature=temperature, rescale_lr=False
    )
    model.weight_prior_mean.fill_(0.3)
    for _ in range(120):
        for axis in 3**0.5 * torch.cat([torch.eye(3, **F64), -torch.eye(3, **F64)]):
            with optimizer.sampled(noise={"weight": axis[None]}):
                ((model(x) - y).square().sum() / (2 * len(x))).backward()
        optimizer.step()
    precision = x.T @ x / temperature + 4 * torch.eye(3, **F64)
    assert_close(model.weight_precision[0], precision.diagonal(), rtol=1e-10, atol=0)
    assert_close(
        model.weight.detach().T, torch.linalg.solve(precision, x.T @ y / temperature + 4 * 0.3), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@hypothesis.settings(deadline=None, max_examples=30, derandomize=True)
@hypothesis.given(
    row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2),
    beta2=st.floats(0, 1 - 1e-6),
    hess_init=st.floats(1e-6, 1e6),
)
@hypothesis.example(row=[1e19, 0.0], beta2=0.9, hess_init=1.0)  # finite, but not its new precision
@hypothesis.example(row=[1e30, 0.0], beta2=0.9, hess_init=1.0)
def test_precision_stays_positive_for_any_gradient(estimator, row, beta2, hess_init):
    net = nn.Linear(2, 1, bias=False)
    optimizer = make_optimizer(net, estimator=estimator, beta2=beta2, hess_init=hess_init)
    for seed in range(2):
        with optimizer.sampled(noise={"weight": torch.randn(1, 2, generator=seeded(seed))}):
            net(torch.tensor([row])).mean().backward()
        before = state_of(net)
        try:
            optimizer.step()
        except FloatingPointError:
            assert_close(state_of(net), before, **SAME)
        assert_close(net.weight_precision > 0, torch.ones(1, 2, dtype=torch.bool))
        assert_close([t.isfinite().all().item() for t in net.state_dict().values()], [True] * 4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_is_drawn_and_gets_its_gradient(kind):
    net, (x, y) = make(kind), make_batch()
    baseline = make(kind)
    optimizer = make_optimizer(net)
    sites = {site.name: site for site in bl.posterior(net)}
    assert list(sites) == [name for name, _ in baseline.named_parameters()]
    noise, means = make_noise(net), {name: p.detach().clone() for name, p in net.named_parameters()}
    drawn = {n: (s.mean + noise[n] / s.precision.sqrt()).detach().requires_grad_() for n, s in sites.items()}
    with optimizer.sampled(noise):
        assert_close(dict(net.named_parameters()), dict(baseline.named_parameters()), **SAME)
        output = net(x)
        F.cross_entropy(output, y).backward()
        assert_close({name: site.value for name, site in sites.items()}, drawn, check_dtype=True)
    expected = functional_call(baseline, drawn, (x,))
    assert_close(output, expected)
    grads = torch.autograd.grad(F.cross_entropy(expected, y), list(drawn.values()))
    assert_close([p.grad for p in net.parameters()], list(grads))
    assert_close(net(x), baseline(x), **SAME)
    assert_close({name: site.value.detach() for name, site in sites.items()}, means, **SAME)
    optimizer.step()
    for name, site in sites.items():
        assert not torch.equal(site.mean, means[name]) and len(site.precision.unique()) > 1


def test_statistic_of_a_large_draw():
    """Many values in float32 are drawn with a factor apart, which the estimate must know of."""
    net, x = nn.Linear(300, 300, bias=False), torch.ones(1, 300)
    optimizer = bl.IVON(net, 1, beta2=0.0, weight_decay=1.0, generator=seeded())
    before = net.weight_precision.clone()
    with optimizer.sampled():
        (site,) = bl.posterior(net)
        offset = (site.value - site.mean).detach()
        net(x).square().sum().backward()
    target = net.weight.grad * offset * before + 1.0
    optimizer.step()
    r = 1 - target / before
    assert_close(net.weight_precision, before * (1 - r + r.square() / 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_scopes_nest_and_end_with_an_exception(kind):
    net, (x, _) = trained(kind), make_batch()
    before = net(x)
    with bl.sampled(net, seeded(1)):
        outer = net(x)
        with bl.sampled(net, seeded(2)):
            inner = net(x)
            assert next(iter(bl.posterior(net))).mean is next(net.parameters())
        assert_close(net(x), outer, **SAME)
    with bl.sampled(net, seeded(2)):
        assert_close(net(x), inner, **SAME)
    assert not torch.equal(inner, outer) and not torch.equal(outer, before)
    with pytest.raises(KeyError, match="boom"), bl.sampled(net, seeded(1)):
        raise KeyError("boom")
    with pytest.raises(ValueError, match="noise must hold"), bl.sampled(net, noise={}):
        pass
    assert_close(net(x), before, **SAME)
    assert not [key for module in net.modules() for key in vars(module).keys() & module._parameters.keys()]


@pytest.mark.parametrize("kind", NETWORKS)
def test_predict_is_the_average_over_draws(kind):
    net, (x, _) = trained(kind).float(), make_batch()
    generator, probs, x = seeded(), [], x.float()
    with torch.no_grad():
        for _ in range(4):
            with bl.sampled(net, generator):
                probs.append(net(x).softmax(1))
    assert_close(bl.predict(net, x, 4, generator=seeded()).probs, torch.stack(probs).mean(0))


@pytest.mark.parametrize("kind", NETWORKS)
def test_plain_twin_and_copy(kind):
    net, (x, _) = trained(kind), make_batch()
    baselines = [bl.to_deterministic(net)]
    with bl.sampled(net, seeded()):
        drawn = net(x)
        baselines.append(bl.to_deterministic(net))
        assert_close(net(x), drawn, **SAME)
    for baseline in baselines:
        assert_close(baseline(x), net(x), **SAME)
        assert {type(module._parameters) for module in baseline.modules()} == {dict}
        plain = kind()
        if kind is Tied:
            plain.norm = nn.LayerNorm(8)
        assert baseline.state_dict().keys() == plain.state_dict().keys()
        kinds = [[type(module).__name__ for module in network.modules()] for network in (baseline, plain)]
        assert kinds[0] == kinds[1]
    baseline = copy.deepcopy(net)
    with bl.sampled(baseline, seeded()):
        assert_close(baseline(x), drawn, **SAME)
    train(baseline, make_optimizer(baseline, keep_posterior=True), range(1))
    with bl.sampled(net, seeded()):
        assert_close(net(x), drawn, **SAME)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(2, **F64))
        self.linear = nn.Linear(8, 2, **F64)
        self.linear.bias.requires_grad_(False)

    def forward(self, x):
        return self.linear(x) + self.shift


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo looks at, its own filter in vain
@pytest.mark.parametrize("scope_first", [False, True])
def test_compiled_network_is_drawn(scope_first):
    torch.compiler.reset()
    net, (x, y) = Shift(), make_batch()
    optimizers = make_optimizer(net), make_optimizer(baseline := copy.deepcopy(net))
    compiled = torch.compile(net, backend="eager")
    if not scope_first:
        assert_close(compiled(x), net(x))
    for seed in range(2):
        with bl.sampled(net, seeded(seed)):
            assert_close(compiled(x), net(x))
        assert_close(compiled(x), net(x))
    for model, optimizer in zip((compiled, baseline), optimizers, strict=True):
        with optimizer.sampled():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_close(state_of(net), state_of(baseline))


def test_frozen_parameters_are_left_alone():
    net = make(Recurrent)
    net.lstm.requires_grad_(False)
    before = state_of(net)
    optimizer = make_optimizer(net)
    train(net, optimizer, range(2))
    assert_close({k: v for k, v in state_of(net).items() if k in before and "lstm" in k},
                 {k: v for k, v in before.items() if "lstm" in k}, **SAME)  # fmt: skip
    assert not [name for name, _ in net.named_buffers() if "lstm" in name]
    net.lstm.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'lstm\.weight_ih_l0' must have a posterior.* add_param_group"):
        train(net, optimizer, range(1))
    optimizer.add_param_group({"params": net.lstm.parameters(), "hess_init": 2.0})
    assert_close(net.lstm.weight_ih_l0_precision, torch.full((12, 4), 50 * (2.0 + 1e-4), **F64))
    train(net, optimizer, range(1))
    assert not torch.equal(net.lstm.weight_ih_l0, before["lstm.weight_ih_l0"])


def test_groups_have_their_own_prior_and_start():
    net = make(Recurrent)
    group = {"params": [net.head.bias], "weight_decay": 0.2, "hess_init": 3.0, "temperature": 0.5}
    make_optimizer(net, groups=[group])
    assert_close(float(net.head.bias_prior_precision), 100 * 0.2)
    assert_close(net.head.bias_precision, torch.full((2,), 100 * 3.2, **F64))
    assert_close(float(net.head.weight_prior_precision), 50 * 1e-4)
    assert_close(net.head.weight_precision, torch.full((2, 3), 50 * 0.5001, **F64))


def test_keep_posterior_keeps_what_was_loaded():
    net = trained(Tied)
    before = state_of(net)
    net.extra = nn.Linear(2, 2).double()
    make_optimizer(net, keep_posterior=True)
    assert_close({key: net.state_dict()[key] for key in before}, before, **SAME)
    assert_close(net.extra.bias_precision, torch.full((2,), 50 * 0.5001, **F64))
    make_optimizer(net)
    assert_close(net.output.bias_precision, torch.full((2,), 50 * 0.5001, **F64))


def test_padding_row_is_not_drawn():
    net = nn.Sequential(nn.Embedding(4, 3, padding_idx=1), nn.Linear(3, 2))
    bl.IVON(net, 10)
    with bl.sampled(net, seeded()):
        rows = net[0](torch.arange(4))
    assert_close(rows[1], torch.zeros(3), **SAME)
    assert bool((rows != net[0].weight).any(1)[[0, 2, 3]].all())


def test_other_methods_refuse_what_has_no_layer():
    net = trained(Attention)
    with pytest.raises(
        ValueError, match=r"must be of a layer with a curvature rule, .* got a MultiheadAttention\. Use IVON"
    ):
        bl.VOGN(net, 10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [None, 0], ids=["default_generator", "own_generator"])
def test_resume_is_exact(estimator, seed):
    def start(seed):
        net = make(Recurrent)
        generator = None if seed is None else seeded(seed)
        return net, make_optimizer(net, num_samples=2, generator=generator, estimator=estimator)

    net, optimizer = start(seed)
    torch.manual_seed(5)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    train(net, optimizer, range(3, 6))
    resumed, second = start(None if seed is None else seed + 1)
    file.seek(0)
    posterior, state, rng_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(posterior), second.load_state_dict(state), torch.set_rng_state(rng_state)
    train(resumed, second, range(3, 6))
    assert_close(state_of(resumed, second), state_of(net, optimizer), **SAME)


@pytest.mark.parametrize("bad_draw", [0, 1])
@pytest.mark.parametrize("bad", ["exception", "loss", "gradient", "precision"])
def test_nothing_is_lost_when_a_step_fails(bad, bad_draw):
    (x, y), net, baseline = make_batch(), make(Recurrent), make(Recurrent)
    optimizers = [make_optimizer(model, num_samples=2) for model in (net, baseline)]
    for model, optimizer in zip((net, baseline), optimizers, strict=True):
        train(model, optimizer, range(2))
    before, output, draws = state_of(net, optimizers[0]), net(x), iter(range(2))

    def closure():
        loss = F.cross_entropy(net(x), y)
        fails = next(draws) == bad_draw
        (loss * (1e200 if fails and bad == "precision" else 1)).backward()
        if fails and bad == "exception":
            raise KeyError("boom")
        if fails and bad == "gradient":
            list(net.parameters())[-1].grad[0] = math.nan
        return loss * math.inf if fails and bad == "loss" else loss

    with pytest.raises(KeyError if bad == "exception" else FloatingPointError, match=r"boom|must be finite, got"):
        optimizers[0].step(closure)
    assert_close(state_of(net, optimizers[0]), before, **SAME)
    assert_close(net(x), output, **SAME)
    with pytest.raises(RuntimeError, match="got none since the last step"):
        optimizers[0].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # the generator has gone on
    for model, optimizer in zip((net, baseline), optimizers, strict=True):
        train(model, optimizer, range(1))
    assert_close(state_of(net, optimizers[0]), state_of(baseline, optimizers[1]), **SAME)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_grad_scaler_leaves_the_step_as_it_is(estimator, clips):
    (x, y), nets = make_batch(), [make(Attention), make(Attention)]
    for net, enabled in zip(nets, (False, True), strict=True):
        optimizer = make_optimizer(net, estimator=estimator)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for seed in range(2):
            with optimizer.sampled(noise=make_noise(net, seed)):
                scaler.scale(F.cross_entropy(net(x), y)).backward()
        if clips:
            optimizer.unscale_(scaler)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("dataset_size", "temperature", "hess_init", "weight_decay")
          for value in (0, -1.5, math.nan, math.inf)],
        *[("lr", value) for value in (-0.1, math.nan, math.inf)],
        *[(name, value) for name in ("beta1", "beta2") for value in (-0.1, 1.0, math.nan)],
        *[("clip_radius", value) for value in (0, -1.0, math.nan)],
        *[("num_samples", value) for value in (0, 1.5, True)],
        ("estimator", "hutchinson"),
    ],
)  # fmt: skip
def test_bad_argument_is_refused_by_name_and_value(name, value):
    net = make(Recurrent)
    before = state_of(net)
    with pytest.raises(ValueError, match=f"^{name} must be .* got '?{value}'?\\.$"):
        bl.IVON(net, **{"dataset_size": 10, name: value})
    assert_close(state_of(net), before, **SAME)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), ValueError, "model must have a parameter that requires a gradient"),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            TypeError,
            "parameter 'weight' must be of real numbers, got .*complex",
        ),
    ],
)
def test_model_with_nothing_to_draw_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        bl.IVON(model, 10)


@pytest.mark.parametrize("tensor_prior", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_saved_posterior_loads_into_a_new_network(kind, attached, tensor_prior, tmp_path):
    net, (x, _) = trained(kind), make_batch()
    if tensor_prior:
        bl.posterior_to_prior(net)
    bl.save_posterior(net, tmp_path / "mine")
    fresh = kind().double().eval()
    if attached:
        bl.IVON(fresh, 10)
    bl.load_posterior(tmp_path / "mine", fresh)
    assert_close(fresh.state_dict(), net.state_dict(), **SAME)
    with bl.sampled(fresh, seeded()), bl.sampled(net, seeded()):
        assert_close(fresh(x), net(x), **SAME)


def test_zoo_loads_a_plain_network(tmp_path, monkeypatch):
    def small(input_size=(1, 2, 4)):
        return nn.Sequential(nn.Flatten(), Attention())

    monkeypatch.setitem(_BUILDERS, "small", small)
    net, x = zoo.create("small"), torch.randn(3, 1, 2, 4)
    bl.IVON(net, 10)
    bl.save_posterior(net, tmp_path / "mine")
    loaded = zoo.load(tmp_path / "mine")
    assert_close(bl.predict(loaded, x, 2, generator=seeded()).probs, bl.predict(net, x, 2, generator=seeded()).probs)


def spoil(net, key, change):
    module = net.get_submodule(key.rpartition(".")[0])
    buffer = module._buffers.pop(key.rpartition(".")[2])
    if (changed := change(buffer)) is not None:
        module.register_buffer(key.rpartition(".")[2], changed)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("output.bias_precision", lambda t: None, r"got 'output.bias_prior_mean' \(2 unknown\)"),
        ("output.bias_precision", lambda t: t[:1], r"'output.bias_precision' must be .* of shape \(2,\), got"),
        ("output.bias_prior_mean", lambda t: t.expand(3), r"'output.bias_prior_mean' must be"),
        ("output.bias_precision", lambda t: t.long(), r"'output.bias_precision' must be .* got I64"),
        ("output.bias_precision", lambda t: -t, r"precision 'output.bias_precision' must be > 0"),
        ("output.bias_prior_mean", lambda t: t * math.nan, r"'output.bias_prior_mean' must be finite"),
    ],
)
def test_bad_posterior_leaves_a_plain_network_as_it_was(key, change, message, tmp_path, monkeypatch):
    net = trained(Tied)
    spoil(net, key, change)
    monkeypatch.setattr("bayeslayers.storage.posterior.check_values", lambda *arguments: None)
    bl.save_posterior(net, tmp_path / "mine")
    fresh = Tied()
    before = state_of(fresh)
    with pytest.raises(bl.PosteriorError, match=message):
        bl.load_posterior(tmp_path / "mine", fresh)
    assert_close(state_of(fresh), before, **SAME)


def test_two_posteriors_of_tied_weights_are_refused(tmp_path):
    net, fresh = Tied(), Tied()
    net.output.weight = nn.Parameter(torch.ones(2, 8))
    bl.IVON(net, 10)
    bl.save_posterior(net, tmp_path / "mine")
    with pytest.raises(bl.PosteriorError, match=r"got 'output.weight_precision' \(3 unknown\)"):
        bl.load_posterior(tmp_path / "mine", fresh)
    attach_posterior(fresh.table, 1.0, 1.0)
    attach_posterior(fresh.output, 1.0, 1.0, ["weight"])
    with pytest.raises(ValueError, match=r"'output.weight' must belong to one .* layer, got that of 'table.weight'"):
        list(bl.posterior(fresh))


def test_a_frozen_layer_keeps_its_posterior():
    net = torch.nn.Sequential(bl.BayesLinear(3, 4, init_precision=123.0, prior_precision=7.0), torch.nn.Linear(4, 2))
    net[0].requires_grad_(False)
    before = {name: value.clone() for name, value in net[0].state_dict().items()}
    bl.IVON(net, dataset_size=1000, lr=0.1)
    torch.testing.assert_close(dict(net[0].state_dict()), before, rtol=0, atol=0)
    assert net[1].weight_precision.unique().tolist() == pytest.approx([1000.1])
