"""Every layer's curvature against squared per-example gradients, taken one example at a time by vmap(grad)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.curvature_cases import make_input, make_pair, per_case, potential
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bayeslayers as bl
from bayeslayers.curvature import accumulate, conv, linear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
EXACT = {"rtol": 1e-10, "atol": 1e-12}

# (kind of torch.nn layer, arguments, keyword arguments, shape of the input)
LINEAR = [
    ("Linear", (3, 4), {}, (5, 3)),
    *[("Linear", (3, 4), {}, (5, t, 3)) for t in (1, 3, 4, 5, 17)],
    ("Linear", (3, 4), {}, (4, 2, 3, 3)),
    ("Linear", (3, 4), {}, (3,)),
    ("Linear", (3, 4), {"bias": False}, (5, 3)),
    ("Linear", (3, 4), {"bias": False}, (5, 3, 3)),
]
FEW_POSITIONS = [
    ("Conv1d", (2, 3, 3), {"dilation": 2}, (5, 2, 7)),
    ("Conv2d", (2, 3, 3), {"padding": 1}, (5, 2, 1, 1)),
    ("Conv2d", (2, 3, (3, 2)), {"stride": 2, "padding": 1}, (5, 2, 4, 3)),
    ("Conv3d", (2, 3, 2), {}, (5, 2, 2, 3, 3)),
    ("ConvTranspose2d", (2, 3, 3), {"stride": 2, "output_padding": 1}, (5, 2, 2, 1)),
]
CONV = [
    ("Conv1d", (2, 3, 3), {}, (4, 2, 8)),
    ("Conv1d", (2, 3, 4), {"padding": "same"}, (4, 2, 7)),
    ("Conv1d", (2, 3, 3), {"padding": 2, "padding_mode": "circular"}, (4, 2, 7)),
    ("Conv1d", (2, 3, 3), {}, (2, 8)),
    ("Conv2d", (2, 3, 3), {"stride": 2, "padding": 1}, (4, 2, 8, 8)),
    ("Conv2d", (2, 3, 1), {"stride": 2}, (4, 2, 5, 5)),
    ("Conv2d", (2, 3, (3, 2)), {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}, (4, 2, 7, 6)),
    ("Conv2d", (2, 3, 3), {"padding": "same"}, (4, 2, 5, 5)),
    ("Conv2d", (2, 3, (2, 3)), {"padding": "same", "dilation": (3, 1)}, (4, 2, 6, 5)),
    ("Conv2d", (2, 3, 3), {"padding": "valid"}, (4, 2, 5, 5)),
    ("Conv2d", (2, 3, 4), {"padding": "same", "padding_mode": "replicate"}, (4, 2, 5, 5)),
    ("Conv2d", (2, 3, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (4, 2, 5, 5)),
    ("Conv2d", (2, 3, 3), {"padding": (2, 1), "padding_mode": "circular", "stride": 2}, (4, 2, 5, 5)),
    ("Conv2d", (4, 6, 3), {"groups": 2, "padding": 1}, (4, 4, 5, 5)),
    ("Conv2d", (4, 8, 3), {"groups": 4, "bias": False}, (4, 4, 5, 5)),
    ("Conv2d", (2, 3, 3), {"bias": False}, (2, 5, 5)),
    ("Conv3d", (2, 3, 2), {"padding": 1, "stride": (1, 2, 2)}, (3, 2, 3, 4, 4)),
    *FEW_POSITIONS,
    ("Conv3d", (2, 2, (1, 2, 3)), {"padding": "same", "groups": 2}, (3, 2, 2, 4, 4)),
    ("ConvTranspose1d", (2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (4, 2, 5)),
    ("ConvTranspose2d", (2, 3, 3), {"bias": False}, (4, 2, 4, 4)),
    ("ConvTranspose2d", (4, 6, (3, 2)), {"stride": (2, 3), "groups": 2, "output_padding": (1, 2)}, (4, 4, 3, 3)),
    ("ConvTranspose2d", (3, 3, 2), {"dilation": 2, "padding": 1, "groups": 3}, (4, 3, 4, 4)),
    ("ConvTranspose2d", (2, 3, 3), {"dilation": 3, "output_padding": 2}, (4, 2, 4, 4)),
    ("ConvTranspose2d", (2, 3, 3), {"stride": 2}, (2, 4, 4)),
    ("ConvTranspose3d", (2, 2, 2), {"stride": 2, "output_padding": (0, 1, 0)}, (3, 2, 2, 2, 2)),
]
NORM = [
    ("LayerNorm", (4,), {}, (5, 4)),
    ("LayerNorm", (4,), {}, (5, 3, 4)),
    ("LayerNorm", (4,), {"bias": False}, (5, 2, 3, 4)),
    ("LayerNorm", ((3, 4),), {}, (5, 2, 3, 4)),
    ("LayerNorm", ((3, 4),), {}, (3, 4)),
    ("GroupNorm", (2, 4), {}, (5, 4)),
    ("GroupNorm", (2, 4), {}, (5, 4, 3, 3)),
    ("GroupNorm", (1, 4), {}, (5, 4, 3)),
    ("FilterResponseNorm2d", (4,), {}, (5, 4, 3, 2)),
]
EMBEDDING = [("Embedding", (6, 3), {"padding_idx": padding}, shape) for padding, shape in
             [(None, (5, 4)), (2, (5, 4)), (-1, (5, 2, 3)), (None, (7,)), (None, ())]]  # fmt: skip


def tracked_curvature(net: nn.Module, x: torch.Tensor, n: int, halves: int = 1) -> dict[str, torch.Tensor]:
    """Return the mean of squared per-example gradients by name; the mean loss's gradients are left in `.grad`."""
    with bl.tracked(net) as tracker:
        for part in x.chunk(halves) if halves > 1 else [x]:
            (potential(net(part)) / n).backward()
    assert_close(tracker.examples, n)
    return {name: leaf.grad * n for name, leaf in tracker.leaves.items()}


def oracle(counterpart: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean of squared per-example gradients by vmap(grad)."""
    weights = {name: p.detach() for name, p in counterpart.named_parameters()}
    per_example = vmap(grad(lambda w, x_i: potential(functional_call(counterpart, w, x_i[None]))), (None, 0))(
        weights, x
    )
    return {name: g.square().mean(0) for name, g in per_example.items()}


def check(kind: str, args: tuple, kwargs: dict, shape: tuple) -> None:
    """Assert that a layer's output, gradients and curvature are those of its counterpart, example by example."""
    layer, counterpart = make_pair(kind, args, kwargs)
    x = make_input(kind, shape)
    x_counterpart = x.detach().clone().requires_grad_(x.requires_grad)
    axes = {"Linear": 2, "LayerNorm": counterpart.weight.dim() + 1, "Embedding": 1}
    alone = x.dim() < axes.get(kind, counterpart.weight.dim())  # a single example without its dimension
    n = 1 if alone else len(x)
    curvature = tracked_curvature(layer, x, n)
    (potential(counterpart(x_counterpart)) / n).backward()
    assert_close(layer(x), counterpart(x_counterpart), **EXACT)
    assert_close(x.grad, x_counterpart.grad, **EXACT)
    grads = [{name: p.grad for name, p in net.named_parameters()} for net in (layer, counterpart)]
    assert_close(*grads, **EXACT)
    assert_close(curvature, oracle(counterpart, x.detach()[None] if alone else x.detach()), **EXACT)


@per_case([*LINEAR, *CONV, *NORM, *EMBEDDING])
def test_curvature_is_that_of_per_example_gradients(kind, args, kwargs, shape):
    check(kind, args, kwargs, shape)


def choose(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all layers take one route, whatever the others cost; a linear one has "products" for "groups"."""
    monkeypatch.setattr(conv, "fastest", lambda costs: route)
    monkeypatch.setattr(linear, "fastest", lambda costs: "pairs" if route == "pairs" else "products")


@pytest.mark.parametrize("route", ["pairs", "groups", "products"])
@per_case([*LINEAR, *CONV])
def test_every_route_gives_the_curvature(kind, args, kwargs, shape, route, monkeypatch):
    choose(route, monkeypatch)
    check(kind, args, kwargs, shape)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@per_case([
    ("BatchNorm1d", (3,), {}, (6, 3)), ("BatchNorm1d", (3,), {}, (6, 3, 4)),
    ("BatchNorm2d", (3,), {}, (6, 3, 4, 2)), ("BatchNorm3d", (3,), {"momentum": None}, (6, 3, 2, 2, 2)),
])  # fmt: skip
def test_batch_norm_curvature_holds_the_normalised_input_fixed(kind, args, kwargs, shape, training):
    layer, counterpart = make_pair(kind, args, kwargs)
    counterpart.running_mean.normal_()
    counterpart.running_var.uniform_(0.5, 2)
    layer.load_state_dict(counterpart.state_dict())
    layer.train(training), counterpart.train(training)
    x = make_input(kind, shape)
    x_counterpart = x.detach().clone().requires_grad_()
    running = (counterpart.running_mean.clone(), counterpart.running_var.clone())
    x_hat = F.batch_norm(x_counterpart.detach(), *running, training=training, eps=counterpart.eps)

    def loss_of_example(weights, x_hat_i):  # (c, *positions)
        scale, shift = (w.reshape(-1, *[1] * (x_hat_i.dim() - 1)) for w in weights)
        return potential(x_hat_i * scale + shift)

    weights = (counterpart.weight.detach(), counterpart.bias.detach())
    expected = [g.square().mean(0) for g in vmap(grad(loss_of_example), (None, 0))(weights, x_hat)]
    curvature = tracked_curvature(layer, x, len(x))
    (potential(counterpart(x_counterpart)) / len(x)).backward()
    assert_close([curvature["weight"], curvature["bias"]], expected, **EXACT)
    assert_close(
        [x.grad, layer.weight.grad, layer.bias.grad],
        [x_counterpart.grad, counterpart.weight.grad, counterpart.bias.grad],
        **EXACT,
    )
    assert_close([layer.running_mean, layer.running_var], [counterpart.running_mean, counterpart.running_var], **EXACT)


CHUNKED = [
    ("Linear", (3, 4), {}, (5, 6, 3)), ("Conv2d", (2, 3, 3), {}, (5, 2, 5, 5)),
    ("ConvTranspose2d", (2, 3, 2), {}, (5, 2, 3, 3)), ("Conv2d", (2, 3, 3), {}, (5, 2, 4, 4)),
]  # fmt: skip


@pytest.mark.parametrize("budget", [1, 100, 300], ids=["one_value", "rows_of_an_example", "a_few_examples"])
@pytest.mark.parametrize("route", ["pairs", "groups", "products"])
@per_case(CHUNKED)
def test_chunks_change_nothing(kind, args, kwargs, shape, route, budget, monkeypatch):
    layer, counterpart = make_pair(kind, args, kwargs)
    x = make_input(kind, shape)
    choose(route, monkeypatch)
    monkeypatch.setitem(accumulate.CHUNK_BYTES, "cpu", budget)
    assert len(list(accumulate.chunks(len(x), layer.weight.numel(), x))) > 1
    assert_close(tracked_curvature(layer, x, len(x)), oracle(counterpart, x.detach()), **EXACT)


@per_case([*CHUNKED, ("LayerNorm", (4,), {}, (5, 3, 4)), ("Embedding", (6, 3), {}, (5, 4))])
def test_parts_of_a_batch_add_up_in_one_scope(kind, args, kwargs, shape):
    layer, _ = make_pair(kind, args, kwargs)
    x = make_input(kind, shape)
    assert_close(tracked_curvature(layer, x, len(x), halves=2), tracked_curvature(layer, x, len(x)), **EXACT)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@per_case([CHUNKED[0], CHUNKED[1], CHUNKED[2], ("GroupNorm", (2, 4), {}, (5, 4, 3))])
def test_frozen_parameter_gets_no_leaf(kind, args, kwargs, shape, frozen):
    layer, counterpart = make_pair(kind, args, kwargs)
    layer.get_parameter(frozen).requires_grad_(False)
    x = make_input(kind, shape)
    expected = oracle(counterpart, x.detach())
    del expected[frozen]
    assert_close(tracked_curvature(layer, x, len(x)), expected, **EXACT)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        bl.BayesConv2d(2, 4, 3, padding=1), bl.BayesGroupNorm(2, 4), nn.Tanh(), nn.Flatten(), bl.BayesLinear(64, 3)
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    net, x = small_net().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = tracked_curvature(net, x, len(x))
    with bl.tracked(net) as tracker:
        for part in x.chunk(2):  # two backward passes, which are no reuse
            h = checkpoint(net[:3], part, use_reentrant=reentrant)
            (potential(checkpoint(net[3:], h, use_reentrant=reentrant)) / len(x)).backward()
    assert_close({name: leaf.grad * len(x) for name, leaf in tracker.leaves.items()}, expected, **EXACT)


def call(module, x):
    return module(x)


def call_reentrant(module, x):
    return checkpoint(module, x, use_reentrant=True)


def call_checkpointed(module, x):
    return checkpoint(module, x, use_reentrant=False)


@pytest.mark.parametrize("first", [call, call_reentrant, call_checkpointed])
@pytest.mark.parametrize("second", [call, call_reentrant, call_checkpointed])
def test_reused_layer_is_refused_by_name(first, second):
    net = nn.ModuleDict({"twice": bl.BayesLinear(3, 3)})
    with bl.tracked(net), pytest.raises(RuntimeError, match="layer 'twice' must run in one call"):
        potential(second(net["twice"], first(net["twice"], torch.randn(4, 3, requires_grad=True)))).backward()


@pytest.mark.parametrize("second", [call, call_reentrant, call_checkpointed])
def test_layer_that_folds_examples_is_refused_with_both_names(second):
    net = nn.ModuleDict({"before": bl.BayesLinear(3, 3), "after": bl.BayesLinear(3, 3)})
    with bl.tracked(net), pytest.raises(RuntimeError, match=r"layer 'before'.* got 4 there and 8 in layer 'after'"):
        potential(second(net["after"], net["before"](torch.randn(4, 2, 3)).flatten(0, 1))).backward()


def test_autocast_sums_squares_in_float32():
    net, x = small_net(), torch.randn(16, 2, 4, 4)
    exact = tracked_curvature(net, x, len(x))
    with bl.tracked(net) as tracker:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        (potential(y.float()) / len(x)).backward()
    for name, leaf in tracker.leaves.items():
        assert_close(leaf.grad * len(x), exact[name], rtol=0.05, atol=0.02 * float(exact[name].max()))


def drawn_curvature(net: nn.Module, forward: nn.Module, noise: dict, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with bl.sampled(net, noise=noise):
        with bl.tracked(net) as tracker:
            potential(forward(x)).backward()
    return {name: leaf.grad for name, leaf in tracker.leaves.items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at the draws
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_net_gives_the_same_curvature(backend):
    torch._dynamo.reset()
    net = small_net().double()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for stance in ("default", "fail_on_recompile"):  # the second pass meets the first one's leaves, and another draw
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
        noise = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        expected = drawn_curvature(net, net, noise, x)
        with torch.compiler.set_stance(stance):
            result = drawn_curvature(net, compiled, noise, x)
        assert_close(result, expected, rtol=1e-9, atol=1e-10)


def test_compiled_passes_after_a_checkpointed_one_are_no_reuse():
    net, x = nn.Sequential(bl.BayesLinear(3, 3)), torch.randn(4, 3)
    compiled = torch.compile(net, backend="aot_eager")
    expected = tracked_curvature(net, x, len(x))
    with bl.tracked(net):
        potential(call_checkpointed(net, x)).backward()
    with bl.tracked(net) as tracker:
        for part in x.chunk(2):
            potential(compiled(part)).backward()
    assert_close({name: leaf.grad / len(x) for name, leaf in tracker.leaves.items()}, expected)


def test_curvature_is_backpack_sum_grad_squared():
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    torch.manual_seed(0)
    shape, classes = (6, 2, 6, 6), torch.randint(3, (6,))
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    counterpart, x = nn.Sequential(*layers).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    net = nn.Sequential(bl.BayesConv2d(2, 4, 3, stride=2, padding=1), *layers[1:3], bl.BayesLinear(36, 3)).double()
    net.load_state_dict(counterpart.state_dict())
    with bl.tracked(net) as tracker:
        F.cross_entropy(net(x), classes).backward()
    backpack.extend(counterpart)
    loss = backpack.extend(nn.CrossEntropyLoss())(counterpart(x), classes)
    with backpack.backpack(extensions.SumGradSquared()):
        loss.backward()
    expected = {name: p.sum_grad_squared for name, p in counterpart.named_parameters()}
    assert_close({name: leaf.grad for name, leaf in tracker.leaves.items()}, expected, **EXACT)
