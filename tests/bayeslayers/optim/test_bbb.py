"""BBB against Adam on the explicit bound and the mean-field optimum in closed form, under each kind of draw."""

from __future__ import annotations

import functools
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.layers import perturbation
from bayeslayers.sampling import Sampler

SAME = {"rtol": 0, "atol": 0}
F64 = {"dtype": torch.float64}
EVERY_KIND = pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_net() -> nn.Sequential:
    """Return a net whose precisions and priors differ from entry to entry, or from tensor to tensor."""
    torch.manual_seed(0)
    parts = [bl.BayesConv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), bl.BayesLinear(8, 3)]
    net = nn.Sequential(*parts).double()
    for index, site in enumerate(bl.posterior(net)):
        site.precision.uniform_(20, 60)
        site.prior_mean.fill_(0.1 * index)
        site.module.register_buffer(f"{site.key}_prior_precision", torch.rand_like(site.mean.detach()) + 2)
    return net


def make_batch(n: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 3, 3, generator=seeded(seed), **F64), torch.randint(3, (n,), generator=seeded(seed))


def make_optimizer(net: nn.Module, **kwargs) -> bl.BBB:
    return bl.BBB(net, **{"dataset_size": 50, "lr": 0.02, "generator": seeded(), **kwargs})


def loss_of(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def closure_for(optimizer: bl.BBB, net: nn.Module, batch):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        return loss

    return closure


def state_of(net: nn.Module, optimizer: bl.BBB) -> dict[str, torch.Tensor]:
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors


class Given:
    """A stand-in for a source of randomness, which returns and records values of a generator of its own."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.values: list[torch.Tensor] = []

    def noise(self, generator):  # in place of StandardNormal
        return self

    def fill_(self, out):
        self.values.append(torch.randn(out.shape, generator=self.generator, **F64))
        return self.values[-1]

    def signs(self, like, channel, generator):  # in place of random_signs
        shape = (*like.shape[:2], *[1] * (like.dim() - 2))
        self.values.append(torch.randint(2, shape, generator=self.generator).double() * 2 - 1)
        return self.values[-1]


def explicit_output(parts, x, mean, deviation, noise, values, estimator):
    """Return the output of the net of `make_net`, drawn as `estimator` says with the given random values."""
    values = iter(values)
    for name, part in parts.named_children():
        keys = [key for key, _ in part.named_parameters() if f"{name}.{key}" in deviation]
        if not keys:
            x = functional_call(part, {key: mean[f"{name}.{key}"] for key, _ in part.named_parameters()}, (x,))
            continue
        m, s, e = ({key: tensors.get(f"{name}.{key}") for key in keys} for tensors in (mean, deviation, noise))
        if estimator == "weights":
            x = functional_call(part, {key: m[key] + s[key] * e[key] for key in keys}, (x,))
        elif estimator == "local":
            variance = functional_call(part, {key: s[key] ** 2 for key in keys}, (x**2,))
            x = functional_call(part, m, (x,)) + next(values) * variance.sqrt()
        else:  # a weight for each example, with the signs of its row and column
            turn_in, turn_out, outputs = next(values), next(values), []
            for i in range(len(x)):
                out, in_ = (turn[i].flatten() for turn in (turn_out, turn_in))
                signs = torch.outer(out, in_).reshape(m["weight"].shape[:2] + (1,) * (m["weight"].dim() - 2))
                weight = m["weight"] + s["weight"] * e["weight"] * signs
                bias = m["bias"] + s["bias"] * e["bias"] * out
                outputs.append(functional_call(part, {"weight": weight, "bias": bias}, (x[i : i + 1],)))
            x = torch.cat(outputs)
    return x


@EVERY_KIND
def test_tracks_adam_on_the_explicit_bound(estimator, monkeypatch):
    given = Given(seeded(7))
    monkeypatch.setattr(perturbation, "StandardNormal", given.noise)
    monkeypatch.setattr(perturbation, "random_signs", given.signs)
    net = make_net()
    plain = bl.to_deterministic(net)
    sites = {site.name: site for site in bl.posterior(net)}
    mean = dict(plain.named_parameters())
    log_sigma = {name: (-0.5 * site.precision.log()).requires_grad_() for name, site in sites.items()}
    prior = {name: Normal(site.prior_mean.clone(), site.prior_precision**-0.5) for name, site in sites.items()}
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-8}
    adam = torch.optim.Adam([*mean.values(), *log_sigma.values()], **settings)
    optimizer = make_optimizer(net, beta1=0.8, beta2=0.9, temperature=0.5, estimator=estimator)
    for step in range(20):
        x, y = make_batch(seed=step)
        adam.zero_grad()
        for draw in range(2):
            noise = {name: torch.randn(m.shape, generator=seeded(100 * step + draw), **F64) for name, m in mean.items()}
            given.values = []
            with optimizer.sampled(noise=None if estimator == "local" else noise):
                F.cross_entropy(net(x), y).backward()
            sigma = {name: value.exp() for name, value in log_sigma.items()}
            output = explicit_output(plain, x, mean, sigma, noise, given.values, estimator)
            kl = sum(kl_divergence(Normal(mean[name], sigma[name]), prior[name]).sum() for name in sites)
            ((F.cross_entropy(output, y) + 0.5 / 50 * kl) / 2).backward()
        adam.step()
        optimizer.step()
        assert_close(dict(net.named_parameters()), mean, rtol=1e-7, atol=1e-9)
        for name, site in sites.items():
            assert_close(site.precision, (-2 * log_sigma[name].detach()).exp(), rtol=1e-7, atol=0)


def regression(bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, bl.BayesLinear]:
    """Return x (n, 3), y (n, 1) and a linear model with a prior of its own."""
    x = torch.randn(20, 3, generator=seeded(), **F64) * torch.tensor([1.0, 2.0, 0.5], **F64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], **F64) + torch.randn(20, 1, generator=seeded(1), **F64)
    model = bl.BayesLinear(3, 1, bias=bias, prior_precision=4.0, init_precision=40.0).double()
    for mean in model.parameters():
        nn.init.zeros_(mean)
    model.weight_prior_mean.fill_(0.3)
    return x, y, model


def squared_error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean over examples of half the squared error: a Gaussian's negative log-likelihood."""
    return (model(x) - y).square().sum() / (2 * len(x))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fixed_point_is_the_mean_field_optimum(temperature):
    """Draws at +-sqrt(3) along each axis have the noise's first two moments: for a quadratic loss they are exact."""
    x, y, model = regression()
    optimizer = bl.BBB(model, dataset_size=20, lr=0.3, beta1=0.5, beta2=0.7, temperature=temperature)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93)
    for _ in range(200):
        for noise in (sign * 3**0.5 * axis for axis in torch.eye(3, **F64) for sign in (-1, 1)):
            with optimizer.sampled(noise={"weight": noise[None]}):
                squared_error(model, x, y).backward()
        optimizer.step()
        schedule.step()
    exact_precision = x.T @ x / temperature + 4 * torch.eye(3, **F64)
    exact_mean = torch.linalg.solve(exact_precision, x.T @ y / temperature + 4 * 0.3)
    assert_close(model.weight_precision[0], exact_precision.diagonal(), rtol=1e-7, atol=0)
    assert_close(model.weight.detach().T, exact_mean, rtol=1e-7, atol=0)


@functools.cache
def draw_gradients(estimator: str, count: int = 500) -> torch.Tensor:
    """Return gradients of the loss with respect to mean and log sigma, `(count, 2 * parameters)`."""
    x, y, model = regression(bias=True)
    x, y = x.repeat(5, 1), y.repeat(5, 1)
    sampler = Sampler(list(bl.posterior(model)), seeded(), estimator=estimator, differentiable=True)
    gradients = []
    for _ in range(count):
        model.zero_grad()
        with sampler.draw():
            squared_error(model, x, y).backward()
        leaves = [sampler.leaves[site.name] for site in sampler.sites]
        parts = [*(site.mean.grad for site in sampler.sites), *(leaf.grad * leaf.detach() for leaf in leaves)]
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(gradients)


@EVERY_KIND
def test_gradient_is_unbiased(estimator):
    (x, y, model), gradients = regression(bias=True), draw_gradients(estimator)
    ones = torch.cat([x, torch.ones(20, 1, **F64)], 1)
    mean = torch.cat([model.weight[0], model.bias]).detach()
    expected = torch.cat([ones.T @ (ones @ mean - y[:, 0]), ones.square().sum(0) / 40]) / 20
    z = (gradients.mean(0) - expected) / (gradients.std(0) / len(gradients) ** 0.5)
    assert_close(z.abs().clamp(max=5), z.abs())


def test_draws_of_outputs_lower_the_variance_of_the_gradient():
    variance = {estimator: draw_gradients(estimator).var(0) for estimator in ("weights", "local", "flipout")}
    local, flipout = variance["local"] / variance["weights"], variance["flipout"] / variance["weights"]
    assert float(local.max()) < 0.3 and float(flipout[:4].max()) < 0.3
    assert float(flipout[4:].max()) < 1  # of sigma, for which a batch of 20 is too small


@EVERY_KIND
def test_trains_a_small_net(estimator):
    torch.manual_seed(0)
    x = torch.randn(200, 2, generator=seeded())
    y = (x.square().sum(1) > 1.4).long()  # inside or outside a circle
    net = nn.Sequential(bl.BayesLinear(2, 16), nn.ReLU(), bl.BayesLinear(16, 2))
    optimizer = bl.BBB(net, dataset_size=200, lr=0.03, prior_precision=1.0, estimator=estimator, generator=seeded())
    for _ in range(120):
        optimizer.step(closure_for(optimizer, net, (x, y)))
    prediction = bl.predict(net, x, num_samples=16, generator=seeded())
    assert float((prediction.labels == y).float().mean()) > 0.9
    precisions = torch.cat([site.precision.flatten() for site in bl.posterior(net)])
    assert float(precisions.max()) > 10 * float(precisions.min())  # each found its own, from 1000


@EVERY_KIND
@pytest.mark.parametrize("seed", [None, 0], ids=["default_generator", "own_generator"])
def test_resume_is_exact(estimator, seed):
    def start(seed):
        net = make_net()
        return net, make_optimizer(
            net, estimator=estimator, num_samples=2, generator=None if seed is None else seeded(seed)
        )

    def run(net, optimizer, steps):
        for step in steps:
            optimizer.step(closure_for(optimizer, net, make_batch(seed=step)))

    net, optimizer = start(seed)
    torch.manual_seed(5)
    run(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    run(net, optimizer, range(3, 6))
    resumed, second = start(None if seed is None else seed + 1)
    file.seek(0)
    posterior, state, rng_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(posterior), second.load_state_dict(state), torch.set_rng_state(rng_state)
    run(resumed, second, range(3, 6))
    assert_close(state_of(resumed, second), state_of(net, optimizer), **SAME)


def test_backward_passes_of_one_scope_are_parts_of_one_batch():
    nets, (x, y) = [make_net(), make_net()], make_batch(6)
    noise = {s.name: torch.randn(s.mean.shape, generator=seeded(), **F64) for s in bl.posterior(nets[0])}
    for net, parts in zip(nets, (1, 3), strict=True):
        optimizer = make_optimizer(net)
        with optimizer.sampled(noise):
            if parts > 1:
                F.cross_entropy(net(x), y).backward()  # which zero_grad drops
                optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(net(part_x), part_y) / parts).backward()
        optimizer.step()
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-6, atol=1e-9)


def test_groups_have_hyperparameters_and_priors_of_their_own():
    net = make_net()
    for key in ("weight", "bias"):  # numbers; a prior that is a tensor is an earlier posterior, and stays
        setattr(net[0], f"{key}_prior_precision", torch.tensor(2.0, **F64))
        setattr(net[4], f"{key}_prior_precision", torch.tensor(2.0, **F64))
    before = state_of(net, make_optimizer(net))
    group = {"params": net[4].weight, "lr": 0.0, "prior_precision": 7.0}
    optimizer = make_optimizer(net, groups=[group], prior_precision=3.0)
    optimizer.step(closure_for(optimizer, net, make_batch()))
    assert_close(net[4].weight_prior_precision, torch.tensor(7.0, **F64))
    assert_close(net[0].weight_prior_precision, torch.tensor(3.0, **F64))
    for name in ("weight", "weight_precision"):
        assert torch.equal(getattr(net[4], name), before[f"4.{name}"])
        assert not torch.equal(getattr(net[0], name), before[f"0.{name}"])


@EVERY_KIND
def test_frozen_tensor_stays_as_it_is(estimator):
    net = make_net()
    net[0].weight.requires_grad_(False)
    optimizer = make_optimizer(net, estimator=estimator)
    before = state_of(net, optimizer)
    optimizer.step(closure_for(optimizer, net, make_batch()))
    unchanged = {key for key, value in net.state_dict().items() if torch.equal(value, before[key])}
    assert {key for key in unchanged if "prior" not in key} == {"0.weight", "0.weight_precision"}


def test_grad_scaler_leaves_the_step_as_it_is():
    nets = [make_net(), make_net()]
    for net, enabled in zip(nets, (False, True), strict=True):
        optimizer, scaler = make_optimizer(net), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        with optimizer.sampled():
            scaler.scale(loss_of(net, make_batch())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-10, atol=0)


def test_bad_step_is_refused():
    net = make_net()
    optimizer = make_optimizer(net)
    before = state_of(net, optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) must follow a backward pass under drawn weights"):
        optimizer.step(lambda: loss_of(net, make_batch()).detach())
    noise = {s.name: torch.zeros_like(s.mean) for s in bl.posterior(net)}
    noise["4.weight"][0, 1] = math.inf  # times a gradient of 0
    with optimizer.sampled(noise):
        (net[4].value("weight").clamp(max=9).sum() + 0 * net[0](make_batch()[0]).sum()).backward()
    with pytest.raises(FloatingPointError, match=r"gradient of log sigma of '4\.weight' must be finite, got 1 of 24"):
        optimizer.step()
    assert_close(state_of(net, optimizer), before, **SAME)


@EVERY_KIND
def test_weight_used_past_its_layer_is_refused_by_name(estimator):
    net = make_net()
    optimizer = make_optimizer(net, estimator=estimator)
    with pytest.raises(RuntimeError, match=r"'4\.weight' must get its gradient through its own layer"):
        with optimizer.sampled():
            F.linear(net[:4](make_batch()[0]), net[4].weight).sum().backward()


def test_the_former_name_of_estimator_is_still_read():
    drawn = []
    for option in ("estimator", "how"):
        net = make_net()
        optimizer = bl.BBB(net, 10, generator=seeded(), **{option: "local"})
        assert optimizer.estimator == "local"
        with optimizer.sampled():
            drawn.append(net(make_batch()[0]))
        with bl.sampled(net, seeded(), **{option: "local"}):
            drawn.append(net(make_batch()[0]))
    assert_close(drawn[:2], drawn[2:], **SAME)
    with pytest.raises(ValueError, match="estimator must be 'weights', 'local' or 'flipout', got 'outputs'"):
        bl.BBB(make_net(), 10, how="outputs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("dataset_size", "temperature", "prior_precision", "init_precision")
          for value in (0, -1.5, math.nan, math.inf)],
        *[("lr", value) for value in (-0.1, math.nan, math.inf)],
        *[(name, value) for name in ("beta1", "beta2") for value in (-0.1, 1.0, math.nan)],
        *[("num_samples", value) for value in (0, -1, 1.5, True)],
        ("estimator", "outputs"),
    ],
)  # fmt: skip
def test_bad_argument_is_refused_by_name_and_value(name, value):
    net = make_net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} must be .* got '?{value}"):
        bl.BBB(net, **{"dataset_size": 10, "prior_precision": 5.0, "init_precision": 3.0, name: value})
    assert_close(net.state_dict(), before, **SAME)
