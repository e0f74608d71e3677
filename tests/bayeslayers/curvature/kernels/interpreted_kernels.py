"""Tests of the Triton kernels on a CPU, by Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and then interprets all kernels of the process. So pytest does not
collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import triton.language as tl
from scipy import stats
from support.curvature_cases import potential
from support.kernel_steps import assert_step_is_that_of_torch_ops, moving
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers import curvature
from bayeslayers.curvature import Use
from bayeslayers.curvature.accumulate import Part
from bayeslayers.curvature.kernels import draw, launch, squares, step, triton_draw, triton_squares, use_triton
from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.curvature.kernels.squares import convolution_squares, linear_squares
from bayeslayers.curvature.settings import Settings
from bayeslayers.optim import bundle
from bayeslayers.prediction.chunks import Plan
from bayeslayers.prediction.draws import Networks
from bayeslayers.prediction.shared import skip_samples
from bayeslayers.sampling import Sampler, posterior
from bayeslayers.sampling.flat import SMALL


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Let the kernels run on CPU tensors of any size, and return the names of those that have."""
    names, attempt = [], launch.attempt

    def counted(name, tensor, function):
        names.append(name)
        return attempt(name, tensor, function)

    monkeypatch.setattr(launch, "LANGUAGES", {"cpu": "triton"})
    monkeypatch.setattr(launch, "LARGE", {"triton": 1})
    for module in (draw, step, squares):
        monkeypatch.setattr(module, "attempt", counted)
    monkeypatch.setattr(bundle, "_PIECE", 2**60)
    monkeypatch.setitem(curvature.LINEAR.kernels, "cpu", linear_squares)
    monkeypatch.setitem(curvature.CONVOLUTION.kernels, "cpu", convolution_squares)
    use_triton()
    return names


@pytest.fixture
def bfloat16_dot(monkeypatch):
    """Let the interpreter's `tl.dot` multiply bfloat16 values: Triton 3.8 multiplies the integers that hold them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, dot = interpreter.interpreter_builder, interpreter.interpreter_builder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16 or x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda a, b, *rest: dot(widened(a), widened(b), *rest))


def in_float64(rule, use, g):
    wide = use._replace(
        inputs=tuple(x.double() for x in use.inputs),
        tensors=tuple(None if x is None else x.double() for x in use.tensors),
    )
    return [None if x is None else x.float() for x in rule.squares(wide, g.double())]


def assert_sums(found, expected):
    """Compare with sums in float64, whose rounding goes with their largest entries."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            tolerance = 2e-5 if one.dtype == torch.float32 else 2e-2
            assert_close(one.float(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


# Squares.

LINEAR = [  # input, outputs
    ((1, 5, 1), 1),
    ((3, 37, 17), 70),
    ((2, 16, 64), 64),
    ((1, 7, 130), 3),
    ((5, 2, 3, 9), 4),
    ((9, 33, 20), 65),
]


def linear_use(shape, outputs, bias=True, dtype=torch.float32, needs=(True,) * 5, part=None):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(outputs, shape[-1]).to(dtype)
    needs = needs if bias else (*needs[:2], False, needs[3], False)
    use = Use((x,), (weight, torch.randn(outputs).to(dtype) if bias else None), (), needs, part)
    return use, torch.randn(*shape[:-1], outputs).to(dtype)


@pytest.mark.parametrize("programs", [1, 2, 512], ids=["whole", "unequal parts", "parts"])
@pytest.mark.parametrize(("shape", "outputs"), LINEAR, ids=str)
def test_squares_of_linear_layers(shape, outputs, programs, monkeypatch, launches):
    monkeypatch.setattr(triton_squares, "_PROGRAMS", programs)
    for bias in (True, False):
        use, g = linear_use(shape, outputs, bias)
        assert_sums(linear_squares(use, g), in_float64(curvature.LINEAR, use, g))
        assert_sums(linear_squares(use, g), curvature.LINEAR.squares(use, g))
    assert launches == ["linear squares"] * 4


@pytest.mark.usefixtures("bfloat16_dot")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype, launches):
    use, g = linear_use((4, 40, 20), 18, bias=False, dtype=dtype)
    found = linear_squares(use, g)
    assert_sums(found, in_float64(curvature.LINEAR, use, g))
    assert [x.dtype for x in found if x is not None] == [dtype, dtype, torch.float32]
    x = torch.full((2, 8, 3), 200.0, dtype=dtype)
    use = Use((x,), (torch.ones(3, 3, dtype=dtype), None), (), (False, False, False, True, False))
    assert_close(linear_squares(use, x)[3], torch.full((3, 3), 2 * (8 * 200.0**2) ** 2))  # float16 ends at 65504
    use, g = convolution_use((4, 6, (3, 2), (9, 7), 2, {"padding": 1, "groups": 2, "bias": False}), dtype=dtype)
    assert_sums(convolution_squares(use, g), in_float64(curvature.CONVOLUTION, use, g))
    assert launches == ["linear squares"] * 2 + ["convolution squares"]


def test_what_is_not_asked_for_is_not_returned(launches):
    use, g = linear_use((3, 8, 4), 5, needs=(False, False, False, True, False))
    assert [x is None for x in linear_squares(use, g)] == [True, True, True, False, True]
    assert_sums(linear_squares(use, g), in_float64(curvature.LINEAR, use, g))
    assert launches == ["linear squares"] * 2


def test_a_part_of_the_batch_stands_for_all():
    use, g = linear_use((6, 8, 4), 5, part=Part(0.5, 0.7))
    assert_sums(linear_squares(use, g), in_float64(curvature.LINEAR, use, g))


@pytest.mark.parametrize("change", [
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.mT.contiguous().mT,
    lambda x: x[:1, :1].expand_as(x),
], ids=["position first", "feature before position", "expanded"])  # fmt: skip
def test_any_strides(change):
    use, g = linear_use((3, 10, 6), 7)
    use, g = use._replace(inputs=(change(use.inputs[0]),)), change(g)
    assert_sums(linear_squares(use, g), in_float64(curvature.LINEAR, use, g))


CONVOLUTIONS = [  # channels in and out, kernel, image, examples, options
    (1, 2, (1, 1), (1, 1), 1, {}),
    (3, 5, (3, 3), (7, 8), 3, {"padding": 1}),
    (4, 6, (3, 2), (9, 7), 2, {"stride": (2, 1), "padding": (0, 1), "groups": 2}),
    (6, 9, (2, 3), (11, 10), 2, {"dilation": (2, 3), "padding": (1, 2), "groups": 3}),
    (8, 70, (3, 3), (5, 5), 2, {"stride": 2, "padding": 1}),
    (17, 16, (5, 5), (6, 6), 1, {"padding": 2, "stride": 3, "dilation": 2}),
    (5, 4, (3, 3), (3, 3), 6, {"bias": False}),
    (5, 4, (4,), (13,), 3, {"stride": 2, "padding": 3}),
    (4, 6, (3,), (9,), 2, {"groups": 2, "dilation": 2}),
]


def convolution_use(case, transposed=False, dtype=torch.float32):
    c_in, c_out, kernel, image, n, options = case
    torch.manual_seed(0)
    name = f"Conv{'Transpose' * transposed}{len(image)}d"
    layer = getattr(nn, name)(c_in, c_out, kernel, **options).to(dtype)
    x = torch.randn(n, c_in, *image).to(dtype)
    output_padding = layer.output_padding if transposed else (0,) * len(image)
    settings = Settings(layer.stride, layer.padding, layer.dilation, transposed, output_padding, layer.groups)
    needs = (True, True, layer.bias is not None, True, layer.bias is not None)
    return Use((x,), (layer.weight.detach(), layer.bias), settings, needs), torch.randn_like(layer(x))


@pytest.mark.parametrize("programs", [1, 2, 512], ids=["whole", "unequal parts", "parts"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_squares_of_convolutions(case, programs, monkeypatch, launches):
    monkeypatch.setattr(triton_squares, "_PROGRAMS", programs)
    use, g = convolution_use(case)
    assert_sums(convolution_squares(use, g), in_float64(curvature.CONVOLUTION, use, g))
    assert_sums(convolution_squares(use, g), curvature.CONVOLUTION.squares(use, g))
    if len(case[3]) == 2:
        use = use._replace(inputs=(use.inputs[0].contiguous(memory_format=torch.channels_last),))
        g = g.contiguous(memory_format=torch.channels_last)
        assert_sums(convolution_squares(use, g), in_float64(curvature.CONVOLUTION, use, g))
    assert launches == ["convolution squares"] * (2 if len(case[3]) == 1 else 3)


@pytest.mark.parametrize("case", [
    (4, 6, (3, 2), (5, 4), 2, {"stride": (2, 1), "padding": (1, 0), "groups": 2}),
    (3, 4, (3, 3), (4, 4), 2, {"stride": 2, "output_padding": 1}),
    (3, 4, (3,), (6,), 2, {"stride": 2, "padding": 1, "output_padding": 1}),
], ids=str)  # fmt: skip
def test_squares_of_transposed_convolutions(case, launches):
    use, g = convolution_use(case, transposed=True)
    assert_sums(convolution_squares(use, g), in_float64(curvature.CONVOLUTION, use, g))
    assert launches == ["convolution squares"]


@pytest.mark.parametrize(("function", "rule", "operands"), [
    (linear_squares, curvature.LINEAR, linear_use((3, 8, 4), 5, dtype=torch.float64)),
    (linear_squares, curvature.LINEAR, linear_use((3, 4), 5)),
    (linear_squares, curvature.LINEAR, linear_use((3, 3, 4), 5)),
    (linear_squares, curvature.LINEAR, linear_use((0, 8, 4), 5)),
    (convolution_squares, curvature.CONVOLUTION, convolution_use((4, 4, (3, 3), (5, 5), 2, {"groups": 4}))),
    (convolution_squares, curvature.CONVOLUTION, convolution_use((2, 3, (2, 2, 2), (4, 4, 4), 2, {}))),
], ids=["float64", "no positions", "few positions", "no example", "depthwise", "3-D"])  # fmt: skip
def test_what_no_kernel_takes_goes_by_torch_ops(function, rule, operands, launches):
    assert_close(list(function(*operands)), list(rule.squares(*operands)), rtol=0, atol=0)
    assert launches == []


def tracked_squares(net, x):
    with bl.tracked(net) as tracker:
        potential(net(x)).backward()
    return {name: leaf.grad.clone() for name, leaf in tracker.leaves.items()}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = bl.BayesMultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mix(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("make", "shape"), [
    (lambda: nn.Sequential(bl.BayesLinear(4, 9), nn.Tanh(), bl.BayesLinear(9, 3)), (3, 6, 4)),
    (lambda: nn.Sequential(bl.BayesConv2d(2, 4, 3, padding=1), nn.Tanh(), bl.BayesConv2d(4, 3, 2)), (3, 2, 5, 5)),
    (Attention, (3, 6, 8)),
], ids=["linear", "convolution", "attention"])  # fmt: skip
def test_a_backward_pass_is_the_same_by_kernels(make, shape, launches):
    torch.manual_seed(0)
    net, x = make(), torch.randn(shape)
    found, grads = tracked_squares(net, x), [p.grad.clone() for p in net.parameters()]
    assert len(launches) >= 2
    use_triton(False)
    net.zero_grad()
    net.double()
    expected = tracked_squares(net, x.double())
    for name, value in expected.items():
        assert_close(found[name], value.float(), rtol=1e-4, atol=1e-5 * float(value.max()), msg=name)
    for grad, p in zip(grads, net.parameters(), strict=True):
        assert_close(grad, p.grad.float(), rtol=1e-4, atol=1e-4)


def test_vmap_and_a_compiler_see_torch_ops(launches):
    use, g = linear_use((3, 8, 4), 5)
    expected = curvature.LINEAR.squares(use, g)[3]

    def sums(x, g):
        return linear_squares(use._replace(inputs=(x,)), g)[3]

    found = torch.func.vmap(sums)(use.inputs[0].expand(2, 3, 8, 4), g.expand(2, 3, 8, 5))
    assert_close(found, expected.expand(2, 5, 4))
    assert_close(torch.compile(sums, backend="eager", fullgraph=True)(use.inputs[0], g), expected)
    assert launches == []


# Noise.


def filled(size, seed=0, offset=0):
    out = torch.empty(size)
    triton_draw.fill(out, torch.tensor(seed), offset)
    return out


@pytest.fixture(scope="module")
def values():
    return filled(200_000, seed=3).double()


def test_noise_is_standard_normal(values):
    size = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(size)
    assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / size)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / size)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = size * math.erfc(bound / math.sqrt(2))
        assert abs(int((values.abs() > bound).sum()) - expected) < 5 * math.sqrt(expected), bound
    assert values.abs().max() < 5.7


@pytest.mark.parametrize("lag", [1, 512, 1024, 1536, 2048])
def test_values_are_independent_of_their_neighbours(values, lag):
    for power in (1, 2):  # of a pair from one counter the squares are tied, if cosine and sine are not
        first, second = values[:-lag] ** power, values[lag:] ** power
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(len(first))


def test_seeds_and_counters_give_streams_of_their_own():
    size = 65_536
    used = triton_draw.counters(size)
    streams = [filled(size), filled(size, seed=1), filled(size, seed=2**40), filled(size, offset=used)]
    streams.append(filled(size, offset=2**33))
    for one, other in itertools.combinations(streams, 2):
        assert abs(float((one * other).mean())) < 5 / math.sqrt(size)
        assert not (one == other).float().mean() > 1e-3
    assert_close(filled(2 * size)[size:], streams[3], rtol=0, atol=0)
    assert_close(filled(size), streams[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 511, 2048, 2049, 5000])
@pytest.mark.parametrize("known", [False, True], ids=["precision", "deviation"])
def test_a_sample_is_mean_and_noise_over_root_precision(size, known):
    torch.manual_seed(0)
    mean, precision = torch.randn(size), torch.rand(size) + 0.1
    deviation = precision.rsqrt() if known else None
    out, noise = torch.full((size + 3,), 7.0), torch.full((size + 3,), 7.0)
    source = StandardNormal(torch.Generator().manual_seed(5))
    source.sample_(out[:size], mean, precision, deviation, noise[:size])
    assert_close(out[:size], mean + noise[:size] * precision.rsqrt())
    assert out[size:].eq(7).all() and noise[size:].eq(7).all()
    again = torch.empty(size)
    StandardNormal(torch.Generator().manual_seed(5)).sample_(again, mean, precision, deviation, None)
    assert_close(again, out[:size], rtol=0, atol=0)
    StandardNormal(torch.Generator().manual_seed(5)).fill_(again)
    assert_close(again, noise[:size], rtol=0, atol=0)


def large_net():
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesLinear(260, 300), nn.Tanh(), bl.BayesLinear(300, 260))
    for site in posterior(net):
        site.precision.mul_(torch.rand_like(site.precision) + 0.5)
    return net


def test_a_sampler_draws_by_the_kernel(launches):
    net = large_net()
    values = {}
    for keeps in (True, False):
        sampler = Sampler(list(posterior(net)), torch.Generator().manual_seed(1), keeps_noise=keeps)
        with sampler.draw():
            values[keeps] = {site.name: site.value for site in sampler.sites}
            values[keeps]["0.weight"].sum().backward()
        assert_close(net[0].weight.grad, torch.ones(300, 260))
        net.zero_grad()
    assert_close(values[True], values[False], rtol=0, atol=0)
    for site in posterior(net):
        assert (site.name in sampler.noise) == (site.key != "weight")
    assert launches.count("draw") == 6  # of two weights and the biases together, twice
    sampler = Sampler(list(posterior(net)), torch.Generator().manual_seed(1))
    with sampler.draw():
        for site in sampler.sites:
            assert_close(site.value, site.mean + sampler.noise[site.name] * site.precision.rsqrt())
    with sampler.draw():
        assert not (sampler.sites[0].value == values[True]["0.weight"]).any()


def test_networks_at_once_are_those_of_the_sampler(launches, monkeypatch):
    monkeypatch.setattr(launch, "LARGE", {"triton": SMALL + 1})
    net, generator = large_net(), torch.Generator().manual_seed(2)
    networks = Networks(net, Plan(3, 3, torch.Generator().manual_seed(2)))
    networks.draw(3)
    sampler = Sampler(list(posterior(net)), generator, frozen=True)
    for index in range(3):
        with sampler.draw():
            expected = [site.value for site in sampler.sites]
        found = {site.name: x[index] for stack in networks._stacks for site, x in stack.values.items()}
        assert_close([found[site.name] for site in sampler.sites], expected)
    skip_samples(net, 3, again := torch.Generator().manual_seed(2), {}, 1)
    assert_close(again.get_state(), generator.get_state())
    assert launches.count("draw") == 18


# The step.


@pytest.mark.parametrize("precision_lr", [1e-3, 1.0])
@pytest.mark.parametrize("clip_radius", [math.inf, 0.5])
@pytest.mark.parametrize("priors", [False, True], ids=["scalars", "tensors"])
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_a_step_is_that_of_the_torch_ops(momentum, priors, clip_radius, precision_lr):
    assert_step_is_that_of_torch_ops(3000, momentum, priors, clip_radius, precision_lr)


def test_a_precision_stays_positive_where_the_prior_is_small():
    tensors = moving(1000, False, False)._replace(prior_precision=torch.tensor(1e-6))
    tensors.precision.fill_(1e8)
    tensors.curvature.zero_()
    assert step.step_(tensors, newest=1.0, ess=10.0, lr=0.0, precision_lr=1.0)
    assert_close(tensors.precision, torch.full((1000,), 1e-6))


@pytest.mark.parametrize(("kind", "options"), [
    (bl.VOGN, {"lr": 1e-3}),
    (bl.VOGN, {"lr": 1e-3, "init_precision": "curvature", "beta1": 0.0, "clip_radius": 0.1}),
    (bl.OGN, {"lr": 1e-3}),
    (bl.IVON, {"lr": 1e-2}),
    (bl.IVON, {"lr": 1e-2, "estimator": "gradsq", "beta1": 0.0, "clip_radius": 0.1}),
], ids=str)  # fmt: skip
def test_training_by_kernels_is_training_by_torch_ops(kind, options, launches):
    def trained(on):
        use_triton(on)
        net = nn.Sequential(large_net(), nn.Linear(260, 2))
        optimizer, source = kind(net, 20, **options), torch.Generator().manual_seed(3)
        x, y = torch.randn(6, 5, 260, generator=source), torch.randint(2, (6,), generator=source)
        for _ in range(2):
            noise = {name: torch.randn(p.shape, generator=source) for name, p in net.named_parameters()}
            with optimizer.sampled(None if kind is bl.OGN else noise):
                nn.functional.cross_entropy(net(x).mean(1), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict(), [own.get("momentum") for own in optimizer.state_dict()["state"].values()]

    found, expected = trained(True), trained(False)
    assert_close(found, expected, rtol=2e-4, atol=1e-5)
    assert launches.count("natural-gradient step") == 6  # of two weights and all others together, twice
    assert launches.count("linear squares") == (0 if kind is bl.IVON else 4)
