"""Parameters that modules read themselves: exact by examples wherever their broadcast can be undone, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.per_example import EXACT, F64, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")
N, STEPS, WIDTH = 4, 3, 6


class RMSNorm(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class Reads(nn.Module):
    """A module whose forward reads one parameter, in the way that its name says, between two layers."""

    def __init__(self, form: str, shape: tuple[int, ...]):
        super().__init__()
        self.form, self.value = form, nn.Parameter(torch.randn(shape))
        self.stem, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("index", torch.arange((STEPS) ** 2).view(STEPS, STEPS) % 5)

    def forward(self, x):
        return self.out(getattr(self, self.form)(self.stem(x).tanh())).mean(1)

    def token(self, x):
        return torch.cat([self.value.expand(len(x), -1, -1), x], 1).tanh()

    def positions(self, x):
        return (x + self.value[:, :STEPS]).tanh()

    def twice(self, x):
        return (x * self.value).tanh() + self.value

    def table(self, x):
        q = x.unflatten(2, (2, 3)).transpose(1, 2)
        bias = self.value[self.index].permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)

    def windows(self, x):
        folded = x[:, None].expand(-1, 2, -1, -1).reshape(2 * len(x), STEPS, WIDTH)
        return (folded * self.value).tanh().unflatten(0, (-1, 2)).mean(1)

    def product(self, x):
        return x @ self.value

    def weight(self, x):
        return F.linear(x, self.value)

    def norm(self, x):
        return F.layer_norm(x, (WIDTH,), self.value.exp(), self.value)

    def shares(self, x):
        return torch.einsum("btd,td->btd", x, self.value) + torch.einsum("btd,de->bte", x, self.value.T @ self.value)

    def cast(self, x):
        return x + self.value.to(x).clamp(min=0.1).type_as(x)


FORMS = [
    ("token", (1, 1, WIDTH)),
    ("positions", (1, 9, WIDTH)),
    ("twice", (WIDTH,)),
    ("table", (5, 2)),
    ("windows", (STEPS, WIDTH)),
    ("product", (WIDTH, WIDTH)),
    ("weight", (WIDTH, WIDTH)),
    ("norm", (WIDTH,)),
    ("shares", (STEPS, WIDTH)),
    ("cast", (WIDTH,)),
]
per_form = pytest.mark.parametrize(("form", "shape"), FORMS)


def loss(net, x):
    return potential(net(x))


def sequences(n=N):
    return torch.randn(n, STEPS, WIDTH, generator=torch.Generator().manual_seed(1), **F64)


@pytest.mark.parametrize("parts", [1, 2, 4])
@per_form
def test_a_parameter_that_a_module_reads_is_exact(form, shape, parts):
    net = bayesian(Reads(form, shape))
    assert next(site.name for site in bl.posterior(net)) == "value"
    found, expected = tracked_squares(net, loss, sequences(), parts=parts), squares_by_autograd(net, loss, sequences())
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["twice", "positions"])
def test_checkpointing_changes_nothing(form, reentrant):
    net = bayesian(Reads(form, dict(FORMS)[form]))
    expected = squares_by_autograd(net, loss, sequences())
    inner = net.forward
    net.forward = lambda x: checkpoint(inner, x.requires_grad_(), use_reentrant=reentrant)
    assert_close(tracked_squares(net, loss, sequences()), expected, **EXACT)


@pytest.mark.parametrize("method", ["VOGN", "OGN", "IVON", "KFAC"])
def test_every_method_moves_them_beside_batch_norm(method, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale, self.out = RMSNorm(WIDTH), nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, 2)
            self.batch_norm = nn.BatchNorm1d(STEPS)

        def forward(self, x):
            return self.out(self.batch_norm(self.norm(x)) * self.scale).mean(1)

    torch.manual_seed(0)
    net, report = bl.to_bayesian(Net())
    assert report.coverage == 1
    assert float(net.norm.weight_prior_mean) == 1
    assert float(net.scale_prior_mean) == 0
    before = {site.name: (site.mean.detach().clone(), site.precision.clone()) for site in bl.posterior(net)}
    options = {"fisher": "empirical"} if method == "KFAC" else {"num_samples": 2} if method != "OGN" else {}
    optimizer = getattr(bl, method)(net, dataset_size=20, **options)
    x = sequences().float()

    def closure():
        optimizer.zero_grad()
        value = F.cross_entropy(net(x), torch.arange(N) % 2)
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
    for site in bl.posterior(net):
        assert not torch.equal(site.mean, before[site.name][0]), site.name
        assert not torch.equal(site.precision, before[site.name][1]), site.name
    if method == "VOGN":
        bl.save_posterior(net, tmp_path / "posterior")
        other = Net()
        bl.load_posterior(tmp_path / "posterior", bl.to_bayesian(other, inplace=True)[0])
        assert_close(dict(other.state_dict()), dict(net.state_dict()), rtol=0, atol=0)
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        found = [bl.predict(m, x, 4, generator=g).mean for m, g in zip((net, other), seeds, strict=True)]
        assert_close(*found, rtol=0, atol=0)


def test_a_part_of_the_batch_leaves_them_exact():
    net = bayesian(Reads("twice", (WIDTH,)))
    tracker = bl.sampling.Tracker(bl.sampling.units.layers_of(net), model=net)
    with tracker.track(0.5, torch.Generator().manual_seed(0)):
        loss(net, sequences()).backward()
    assert_close(tracker.leaves["value"].grad, squares_by_autograd(net, loss, sequences())["value"], **EXACT)


class Mixes(Reads):
    def forward(self, x):
        return self.out(x * torch.cdist(x, self.value).mean(-1, keepdim=True))


def test_an_op_that_is_not_known_is_refused_by_name():
    net = bayesian(Mixes("token", (1, STEPS, WIDTH)))
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"parameter 'value', which .*'cdist'"):
        loss(net, sequences()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_function_that_torch_cannot_see_into_is_refused():
    scripted = torch.jit.trace(lambda x, value: x * value, (sequences(), torch.ones(WIDTH, **F64)))

    class Scripted(Reads):
        def forward(self, x):
            return self.out(scripted(x, self.value)).mean(1)

    net = bayesian(Scripted("twice", (WIDTH,)))
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"parameter 'value', which .* cannot see into"):
        loss(net, sequences()).backward()


def test_one_parameter_is_excluded_by_its_name():
    net, report = bl.to_bayesian(Reads("twice", (WIDTH,)), exclude="value")
    assert [site.name for site in bl.posterior(net)] == ["stem.weight", "stem.bias", "out.weight", "out.bias"]
    assert {entry.name: entry.reason for entry in report.entries}["value"] == "excluded"
    net, _ = bl.to_bayesian(Reads("twice", (WIDTH,)), include=["value", "out"])
    assert [site.name for site in bl.posterior(net)] == ["value", "out.weight", "out.bias"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_read_is_refused_with_the_remedy():
    torch._dynamo.reset()
    net = bl.to_bayesian(Reads("twice", (WIDTH,)))[0]
    optimizer, compiled = bl.VOGN(net, 20), torch.compile(net, backend="aot_eager")
    message = r"parameter 'value' must be read in a call .* compiled .* exclude \['value'\]"
    with pytest.raises(RuntimeError, match=message), optimizer.sampled():
        compiled(sequences().float()).square().mean().backward()
