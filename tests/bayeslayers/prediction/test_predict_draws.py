"""Draws at once, in pairs, until they suffice, over a stream; of outputs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import bayeslayers as bl
import zoo
from bayeslayers.prediction import chunks, draws
from bayeslayers.prediction.chunks import AtOnce, Plan
from bayeslayers.prediction.linearised import linearised_outputs
from bayeslayers.sampling import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("mean", "total", "aleatoric", "epistemic", "standard_error")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(*shape):
    return torch.randn(*shape, generator=generator(1), dtype=torch.float64)


def network(outputs=3, precision=5.0):
    torch.manual_seed(0)
    layers = bl.BayesLinear(4, 8, init_precision=precision), nn.Tanh(), bl.BayesLinear(8, outputs)
    return nn.Sequential(*layers).double()


def convolutional():
    torch.manual_seed(0)
    layers = [bl.BayesConv2d(2, 4, 3, padding=1), bl.BayesBatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, bl.BayesLinear(16, 3)).double()
    for site in bl.posterior(net):
        site.precision.fill_(20.0)
    return net


def assert_same(a, b):
    for name in PARTS:
        assert_close(getattr(a, name), getattr(b, name), equal_nan=True)
    assert a.num_samples == b.num_samples


@pytest.mark.parametrize("net, x", [(network(), inputs(5, 4)), (convolutional(), inputs(3, 2, 4, 4))])
@pytest.mark.parametrize("options", [{}, {"antithetic": True}])
def test_draws_at_once_are_draws_one_after_the_other(net, x, options):
    one = bl.predict(net, x, 22, generator=generator(), sample_chunk=1, **options)
    for chunk in (2, 5, 22, 100, "auto"):
        assert_same(bl.predict(net, x, 22, generator=generator(), sample_chunk=chunk, **options), one)


def test_a_matrix_variate_posterior_too():
    net, x = network(), inputs(5, 4)
    net[0].set_roots(*(0.3 * torch.randn(n, n, generator=generator(), dtype=torch.float64) for n in (5, 8)))
    outputs, source = [], generator()
    for _ in range(6):
        with torch.no_grad(), bl.sampled(net, source):
            outputs.append(net(x).softmax(1))
    for chunk in (1, 4):
        found = bl.predict(net, x, 6, generator=generator(), sample_chunk=chunk)
        assert_close(found.probs, torch.stack(outputs).mean(0))


def test_bit_for_bit_with_the_same_arguments():
    net, x = zoo.create("lenet5").eval(), torch.rand(3, 1, 28, 28, generator=generator())
    for method in ("sample", "local"):
        first, second = (bl.predict(net, x, 9, generator=generator(), method=method) for _ in range(2))
        for name in PARTS:
            assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_weights_have_the_values_of_the_sampler(layout):
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesConv2d(64, 130, 3, bias=False), nn.Flatten()).to(memory_format=layout)
    x = torch.rand(1, 64, 3, 3, generator=generator())
    with torch.no_grad(), bl.sampled(net, generator()):
        expected = net(x)
    found = bl.predict(net, x, 1, generator=generator(), likelihood=bl.Gaussian(1.0))
    assert_close(found.mean, expected, rtol=1e-5, atol=1e-5)  # one knows the deviation, one the precision


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"checkpoint": 16}])
@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_chunks_are_about_equal_and_add_up(options, size):
    plan = Plan(42, size, **options)
    counts = list(plan.counts(AtOnce(network(), plan)))
    most = size + size % 2 if plan.antithetic else size
    assert sum(counts) == 42 and max(counts) <= most
    whole = counts[: -(-16 // min(16, most))] if plan.checkpoint else counts  # up to the first checkpoint
    assert sum(whole) == (16 if plan.checkpoint else 42)
    assert max(whole) - min(whole) <= 1 + plan.antithetic
    assert not plan.antithetic or all(count % 2 == 0 for count in counts)


def test_weights_are_sampled_ahead_of_networks_that_run_one_at_a_time(monkeypatch):
    monkeypatch.setattr(chunks, "_CACHE_BYTES", 1)
    net, x, drawn = network(), inputs(5, 4), []
    monkeypatch.setattr(
        draws.Networks, "draw", lambda self, count, draw=draws.Networks.draw: (drawn.append(count), draw(self, count))
    )
    bl.predict(net, x, 33, generator=generator())
    assert drawn == [1, 32]
    monkeypatch.setattr(chunks, "_AHEAD_BYTES", 4 * 8 * (40 + 27))
    drawn.clear()
    bl.predict(net, x, 33, generator=generator())
    assert drawn == [1] + 8 * [4]


class Stubborn(nn.Module):
    """Fails on several samples at once, because it reads a value."""

    def forward(self, x):
        return x if float(x.sum()) < math.inf else -x


def test_a_network_that_takes_one_draw_at_a_time():
    plain, x = network(), inputs(5, 4)
    net = nn.Sequential(plain, Stubborn())
    expected = bl.predict(plain, x, 12, generator=generator())
    assert_same(bl.predict(net, x, 12, generator=generator()), expected)
    with pytest.raises(RuntimeError, match="vmap"):
        bl.predict(net, x, 12, sample_chunk=4)


def test_the_number_at_once_follows_the_largest_output(monkeypatch):
    net, x = network(), inputs(5, 4)
    at_once = AtOnce(net, Plan(64))
    list(at_once.outputs(lambda draws, batch: net(batch).unsqueeze(0), 1, x))
    assert at_once.size == 1 and at_once._largest == 5 * 8 * 8
    at_once.settle()
    assert at_once.size == chunks._MOST
    sizes = [(3 * 320, 2**25, 4), (2 * 320, 2**25, 1), (319, 2**25, 1), (2**22, 5 * 765, 4), (2**22, 765, 1)]
    for largest, total, size in sizes:  # 5 x 8, again after tanh, and 5 x 3 numbers of 8 bytes are 760
        monkeypatch.setattr(chunks, "_CACHE_BYTES", largest)
        monkeypatch.setattr(chunks, "_TOTAL_BYTES", total)
        at_once = AtOnce(net, Plan(64))
        list(at_once.outputs(lambda draws, batch: net(batch).unsqueeze(0), 1, x))
        at_once.settle()
        assert at_once.size == size
    assert not net[0]._forward_hooks
    at_once._measured = False
    at_once.settle(draw_bytes=chunks._WEIGHT_BYTES)
    assert at_once.size == 1


def failing_beyond(limit, error):
    """A `vmap` that runs out of memory beyond so many draws, and notes how many it is given."""
    sizes = []

    def vmap(function):
        def run(*stacks):
            sizes.append(len(stacks[0]))
            if len(stacks[0]) > limit:
                raise error("out of memory")
            return torch.func.vmap(function)(*stacks)

        return run

    return vmap, sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize(("chunk", "num_samples"), [(16, 48), ("auto", 33)])
def test_a_chunk_that_does_not_fit_is_halved_and_says_so_once(monkeypatch, error, chunk, num_samples):
    net, x = network(), inputs(5, 4)
    expected = bl.predict(net, x, num_samples, generator=generator(), sample_chunk=1)
    vmap, sizes = failing_beyond(5, error)
    monkeypatch.setattr(draws, "vmap", vmap)
    with pytest.warns(UserWarning, match="samples at once do not fit into memory: continuing with") as caught:
        found = bl.predict(net, x, num_samples, generator=generator(), sample_chunk=chunk)
    assert len(caught) == 1
    assert_same(found, expected)
    assert sizes[:3] == ([16, 8, 4] if chunk == 16 else [32, 16, 8]) and max(sizes[3:]) <= 5


def test_a_single_draw_that_does_not_fit_is_an_error():
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        bl.predict(nn.Sequential(network(), Full()), inputs(5, 4), 4)


def test_antithetic_pairs_lie_around_the_mean():
    net = bl.BayesLinear(4, 3).double()
    x = inputs(5, 4)
    found = bl.predict(net, x, 6, antithetic=True, likelihood=bl.Gaussian(0.1), generator=generator())
    assert_close(found.mean, net(x).detach())
    assert_close(found.standard_error, torch.zeros_like(found.mean), atol=1e-12, rtol=0)
    deviations = []
    source = generator()
    for _ in range(3):
        with torch.no_grad(), bl.sampled(net, source):
            deviations.append(net(x) - found.mean)
    assert_close(found.epistemic, torch.stack(deviations).square().mean(0))


def test_figures_of_pairs_are_those_of_a_plain_loop():
    net, x, outputs = network(), inputs(5, 4), []
    sampler = Sampler(list(bl.posterior(net)), generator())
    with torch.no_grad():
        for _ in range(23):
            with sampler.draw():
                outputs.append(net(x).softmax(1))
            with sampler.draw({name: -values for name, values in sampler.noise.items()}):
                outputs.append(net(x).softmax(1))
    each = torch.stack(outputs)
    found = bl.predict(net, x, 46, antithetic=True, generator=generator())  # merged in several parts
    assert_close(found.mean, each.mean(0))
    assert_close(found.aleatoric, torch.special.entr(each).sum(2).mean(0))
    assert_close(found.standard_error, each.unflatten(0, (23, 2)).mean(1).std(0) / math.sqrt(23))


def test_the_standard_error_of_pairs_is_that_of_their_means():
    net, x, num_samples = network(), inputs(5, 4), 2000
    runs = [bl.predict(net, x, 40, antithetic=True, generator=generator(seed)) for seed in range(50)]
    means = torch.stack([run.mean for run in runs])
    errors = torch.stack([run.standard_error.square() for run in runs]).mean(0).sqrt()
    assert_close(errors, means.std(0), rtol=5 / math.sqrt(2 * 49), atol=0)
    plain = bl.predict(net, x, num_samples, generator=generator())
    assert errors.mean() < 0.8 * (plain.standard_error * math.sqrt(num_samples / 40)).mean()
    pairs = bl.predict(net, x, num_samples, antithetic=True, generator=generator(1))
    assert (
        (pairs.mean - plain.mean) / (plain.standard_error.square() + pairs.standard_error.square()).sqrt()
    ).abs().max() < 5


def test_draws_end_once_the_tolerance_is_reached():
    net, tolerance = network(), 0.01
    x = torch.cat([1e-3 * inputs(3, 4), 3 * inputs(3, 4)])  # hardly any uncertainty, and much
    truth = bl.predict(net, x, 40_000, generator=generator(9), sample_chunk=1000)
    found = bl.predict(net, x, 4000, tolerance=tolerance, batch_size=3, generator=generator())
    few, many = found.samples_per_batch
    assert few % 16 == many % 16 == 0 and few < many < 4000 and found.num_samples == many
    assert (found.standard_error < tolerance).all()
    assert ((found.mean - truth.mean) / tolerance).abs().max() < 5
    for count, part in ((few, slice(0, 3)), (many, slice(3, 6))):
        exact = bl.predict(net, x[part], count, generator=generator())
        assert_close(found.mean[part], exact.mean)
        assert (bl.predict(net, x[part], count - 16, generator=generator()).standard_error >= tolerance).any()


def test_a_tolerance_is_honoured_over_many_runs():
    """The error in units of the tolerance, over independent runs: no more than a standard normal has."""
    net, x, tolerance = network(), inputs(4, 4), 0.03
    truth = bl.predict(net, x, 40_000, generator=generator(9), sample_chunk=1000).mean
    runs = [bl.predict(net, x, 2000, tolerance=tolerance, generator=generator(seed)).mean for seed in range(60)]
    z = (torch.stack(runs) - truth) / tolerance
    assert z.abs().max() < 5 and z.square().mean() < 1.2


def test_a_tolerance_that_is_not_reached_is_said():
    with pytest.warns(UserWarning, match="tolerance 1e-06 is not reached by 20 samples: .* Raise num_samples"):
        found = bl.predict(network(), inputs(3, 4), 20, tolerance=1e-6)
    assert found.samples_per_batch == (20,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bl.predict(network(), inputs(3, 4), 64, tolerance=10.0).num_samples == 16


@pytest.mark.parametrize("method", ["sample", "mean", "moments"])
def test_a_loader_is_predicted_as_its_tensor(method):
    net, x = network(), inputs(7, 4)
    whole = bl.predict(net, x, 20, generator=generator(), method=method)
    loader = DataLoader(TensorDataset(x, torch.zeros(7)), batch_size=3)
    for data in (loader, iter([x[:4], x[4:]]), [(x[:2],), (x[2:],)]):
        found = bl.predict(net, data, 20, generator=generator(), method=method, result_device="cpu")
        assert_same(found, whole)
    assert len(bl.predict(net, loader, 20, generator=generator(), batch_size=2).samples_per_batch) == 5


def test_a_stream_without_a_generator_shows_all_batches_the_same_draws():
    net, x = network(), inputs(2, 4)
    found = bl.predict(net, [x, x], 5)
    assert_close(found.mean[:2], found.mean[2:])
    assert not torch.allclose(bl.predict(net, [x], 5).mean, found.mean[:2])


def test_progress_shows_a_bar(capsys, monkeypatch):
    net, x = network(), inputs(4, 4)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    bl.predict(net, [x[:2], x[2:]], 2, progress=True)
    assert "predict" in capsys.readouterr().err
    bl.predict(net, DataLoader(TensorDataset(x), batch_size=2), 2)  # no terminal
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize("chunk", [1, 30])
def test_local_draws_have_the_predictive_distribution_of_weights(chunk):
    net, x, num_samples = network(), inputs(6, 4), 2000
    weights = bl.predict(net, x, num_samples, generator=generator())
    local = bl.predict(net, x, num_samples, generator=generator(1), method="local", sample_chunk=chunk)
    error = (weights.standard_error.square() + local.standard_error.square()).sqrt()
    assert ((weights.mean - local.mean) / error).abs().max() < 5
    assert_close(local.standard_error, weights.standard_error, rtol=0.15, atol=0)
    assert_close(local.epistemic, weights.epistemic, rtol=0.15, atol=1e-3)


def test_local_draws_of_a_linear_layer_are_exact():
    net, x, num_samples = bl.BayesLinear(3, 2, init_precision=4.0).double(), inputs(6, 3), 6000
    found = bl.predict(net, x, num_samples, likelihood=bl.Gaussian(0.1), method="local", generator=generator())
    variance = (x.square().sum(1, keepdim=True) + 1).expand(6, 2) / 4
    assert ((found.mean - net(x).detach()) / (variance / num_samples).sqrt()).abs().max() < 5
    assert ((found.epistemic - variance) / (variance * math.sqrt(2 / num_samples))).abs().max() < 5


def test_local_draws_serve_each_draw_its_own_norm():
    """Layers without outputs to draw are drawn once per draw, also where several run at once."""
    net, x, num_samples = convolutional(), inputs(3, 2, 4, 4), 1000
    one, several = (
        bl.predict(net, x, num_samples, method="local", sample_chunk=chunk, generator=generator(chunk))
        for chunk in (1, 50)
    )
    error = (one.standard_error.square() + several.standard_error.square()).sqrt()
    assert ((one.mean - several.mean) / error).abs().max() < 5
    assert_close(several.standard_error, one.standard_error, rtol=0.2, atol=0)
    blocks = [bl.predict(net, x, 10, method="local", sample_chunk=10, generator=generator(seed)) for seed in range(60)]
    spread = torch.stack([block.mean for block in blocks]).std(0)  # draws at once are independent
    assert_close(spread, one.standard_error * math.sqrt(num_samples / 10), rtol=5 / math.sqrt(2 * 59), atol=0)


def test_linearised_draws_average_its_outputs():
    net, x = network(), inputs(5, 4)
    expected = linearised_outputs(net, x, 30, generator()).softmax(2).mean(0)
    assert_close(bl.predict(net, x, 30, method="linearised", generator=generator()).probs, expected)
