"""The kernels of the CPU: their noise, their samples and their steps beside those of torch ops."""

from __future__ import annotations

import gc
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kernel_steps import assert_step_is_that_of_torch_ops, moving
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.curvature.kernels import (
    launch,
    measure,
    numba_draw,
    numba_elbo,
    numba_jit,
    numba_measure,
    numba_step,
    step,
    use_numba,
)
from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.distributions.gaussian import retracted_precision
from bayeslayers.optim import bbb

SAME = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Return the names of the kernels that have run, and turn them on again after the test."""
    names, attempt = [], launch.attempt

    def counted(name, tensor, function):
        names.append(name)
        return attempt(name, tensor, function)

    for module in (sys.modules[StandardNormal.__module__], step, measure):
        monkeypatch.setattr(module, "attempt", counted)
    use_numba()
    yield names
    use_numba()


def words_of(key, first):
    words = np.empty((4, numba_draw._COUNTERS), np.int32)
    numba_draw._words(np.uint64(key), np.uint64(first), words)
    return words.view(np.uint32)


def filled(size, seed=0, offset=0):
    out = torch.empty(size)
    numba_draw.fill(out, torch.tensor(seed), offset)
    return out


@pytest.mark.parametrize(("first", "key"), [(0, 0), (5, 1), (2**32 - 3, 2**40 + 7), (2**40, 2**62 + 12345)])
def test_words_are_those_of_numpys_philox(first, key):
    """NumPy's Philox has words of 64 bits; torch's on a CPU has no key of 64 bits: the ten rounds are written out."""
    words = words_of(key, first)
    for i in (0, 2, 3, 100):
        c, k = [(first + i) % 2**32, (first + i) >> 32, 0, 0], [key % 2**32, key >> 32]
        for _ in range(10):
            low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        assert words[:, i].tolist() == c


def test_words_are_the_published_ones():
    """The known answer of the authors for a counter and a key of zeros (Random123, philox4x32, 10 rounds)."""
    assert words_of(0, 0)[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_values_are_the_radii_and_angles_of_the_words():
    words = np.concatenate([words_of(3, 0).ravel().view(np.int32), np.array([0x003FFFFF, 0x00400000, 0, -1], np.int32)])
    values = np.empty((2, len(words)), np.float32)
    numba_draw._pairs(words, values)
    u = (words << 9).astype(np.float64) * 2.0**-32 + 0.5 + 2.0**-24
    angle = words.astype(np.float64) * math.pi / 2**31
    radius = np.sqrt(-2 * np.log(u))
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    assert np.isfinite(values).all()
    assert_close(torch.from_numpy(values).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert abs(np.hypot(*values[:, -4]) - math.sqrt(-2 * math.log1p(-(2.0**-24)))) < 1e-6  # the shortest radius
    assert abs(np.hypot(*values[:, -3]) - math.sqrt(48 * math.log(2))) < 1e-5  # the longest


@pytest.mark.parametrize("lag", [1, numba_draw._COUNTERS, 2 * numba_draw._COUNTERS, numba_draw._VALUES])
def test_values_are_independent_of_their_neighbours(lag):
    values = filled(2**20).double()
    for power in (1, 2):  # the squares of a pair are tied, if cosine and sine are not independent
        first, second = values[:-lag] ** power, values[lag:] ** power
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(len(first))


def test_seeds_and_counters_give_streams_of_their_own():
    size = 65_536
    streams = [filled(size), filled(size, seed=1), filled(size, seed=2**40)]
    streams += [filled(size, offset=numba_draw.counters(size)), filled(size, offset=2**33)]
    for one, other in itertools.combinations(streams, 2):
        assert abs(float((one * other).mean())) < 5 / math.sqrt(size)
        assert not (one == other).float().mean() > 1e-3
    assert_close(filled(2 * size)[size:], streams[3], **SAME)
    assert_close(filled(size), streams[0], **SAME)


@pytest.mark.parametrize("size", [8192, 10_001])
@pytest.mark.parametrize("known", [False, True], ids=["precision", "deviation"])
def test_a_sample_is_mean_and_noise_over_root_precision(size, known, launches):
    torch.manual_seed(0)
    mean, precision = torch.randn(size), torch.rand(size) + 0.1
    deviation = precision.rsqrt() if known else None
    out, noise = torch.full((size + 3,), 7.0), torch.full((size + 3,), 7.0)
    source, again = StandardNormal(torch.Generator().manual_seed(5)), torch.empty(size)
    source.sample_(out[:size], mean, precision, deviation, noise[:size])
    assert_close(out[:size], mean + noise[:size] * precision.rsqrt())
    assert out[size:].eq(7).all() and noise[size:].eq(7).all()
    StandardNormal(torch.Generator().manual_seed(5)).sample_(again, mean, precision, deviation, None)
    assert_close(again, out[:size], **SAME)
    assert_close(StandardNormal(torch.Generator().manual_seed(5)).fill_(again), noise[:size], **SAME)
    assert launches == ["draw"] * 3


def test_memory_in_channels_last_order_is_sampled_in_its_own_order():
    torch.manual_seed(0)
    mean = torch.randn(32, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    precision, out, noise = torch.rand_like(mean) + 0.1, torch.empty_like(mean), torch.empty_like(mean)
    StandardNormal().sample_(out, mean, precision, None, noise)
    assert_close(out, mean + noise * precision.rsqrt())


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("precision_lr", [None, 1e-3, 1.0])
@pytest.mark.parametrize("clip_radius", [math.inf, 0.5])
@pytest.mark.parametrize("priors", [False, True], ids=["scalars", "tensors"])
def test_a_step_is_that_of_the_torch_ops(momentum, priors, clip_radius, precision_lr):
    assert_step_is_that_of_torch_ops(9001, momentum, priors, clip_radius, precision_lr)


def test_what_is_not_a_number_stays_so():
    tensors = moving(9000, False, False)
    tensors.grad[17] = math.nan
    tensors.grad[4321] = math.inf
    assert step.step_(tensors, newest=1.0, ess=10.0, lr=0.1, precision_lr=0.5, clip_radius=1.0)
    assert tensors.mean.isnan().nonzero().tolist() == [[17]]


@pytest.mark.parametrize("of_root", [False, True])
@pytest.mark.parametrize("priors", [False, True], ids=["scalar", "tensor"])
def test_a_new_precision_is_that_of_the_torch_ops(of_root, priors):
    torch.manual_seed(1)
    precision, statistic = torch.rand(9001) + 0.1, torch.randn(9001)
    prior = torch.rand(9001) + 0.5 if priors else torch.tensor(0.7)
    target = prior + 3.0 * statistic * (precision.sqrt() if of_root else 1.0)
    expected, before = retracted_precision(precision, target, 0.1), statistic._version
    assert step.retract_(precision, statistic, prior, factor=3.0, weight=0.1, of_root=of_root)
    assert_close(statistic, expected, rtol=1e-5, atol=1e-6)
    assert statistic._version > before


def state_of_bbb(beta1, dtype):
    torch.manual_seed(0)
    names = ["grad", "log_sigma_grad", "mean", "precision", "prior_precision"]
    names += ["second_moment", "log_sigma_second_moment"]
    names += ["momentum", "log_sigma_momentum"] if beta1 else []
    state = {name: torch.rand(9001, dtype=torch.float64) for name in names}
    state["precision"] += 1.0
    for name in ("grad", "log_sigma_grad"):
        state[name] -= 0.5
    return {name: value.to(dtype) for name, value in {**state, "prior_mean": torch.tensor(0.1)}.items()}


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_step_of_bbb_is_that_of_the_torch_ops(beta1, launches):
    group = {"lr": 0.1, "beta1": beta1, "beta2": 0.99}
    fast, slow = state_of_bbb(beta1, torch.float32), state_of_bbb(beta1, torch.float64)
    versions = {name: value._version for name, value in fast.items()}
    for count in range(1, 4):
        assert bbb._move_by_kernel(fast, group, count, ess=50.0, scale=0.3)
        bbb._move(slow, group, count, ess=50.0, scale=0.3)
    assert_close(fast, slow, rtol=1e-5, atol=1e-6, check_dtype=False)
    changed = {name for name, value in fast.items() if value._version > versions[name]}
    assert changed == fast.keys() - {"grad", "log_sigma_grad", "prior_mean", "prior_precision"}
    assert launches == ["step of BBB"] * 3
    assert not bbb._move_by_kernel(slow, group, 1, ess=50.0, scale=0.3)  # of float64


def test_the_exponential_is_exact_to_rounding_and_keeps_what_is_no_number():
    x = np.concatenate([np.linspace(-87, 88, 10_001), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)
    found = np.array([numba_elbo._exponential(value) for value in x], np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    ends = [numba_elbo._exponential(np.float32(value)) for value in (math.nan, math.inf, -math.inf, 100.0, -100.0)]
    assert math.isnan(ends[0]) and ends[1:] == [math.inf, 0.0, math.inf, 0.0]


def test_norms_and_smallest_values_are_those_of_torch_ops(launches):
    torch.manual_seed(2)
    lists = [
        [torch.randn(70, 100), torch.randn(3)],
        [],
        [torch.randn(8, 4, 5, 5).to(memory_format=torch.channels_last)],
    ]
    found = measure.norms(lists)
    assert found is not None
    for own, tensors in zip(found, lists, strict=True):
        assert_close(own, [float(x.norm()) for x in tensors], rtol=1e-5, atol=0)
    positive = [x.abs() for x in lists[0]]
    assert measure.smallest(positive) == [float(x.min()) for x in positive]
    for bad in (math.nan, math.inf, -math.inf, -math.nan, 0.0, -1.0):
        positive[0][5, 7] = bad
        assert measure.smallest(positive) == [0.0, float(positive[1].min())]
        assert math.isfinite(measure.norms([positive])[0][0]) == math.isfinite(bad)
    positive[0][5, 7] = 1e30  # the square of which float32 does not hold
    assert measure.norms([positive])[0][0] == math.inf
    ran = len(launches)
    assert measure.norms([[torch.randn(100)]]) is None and measure.smallest([torch.ones(9000).double()]) is None
    assert measure.norms([]) is None and len(launches) == ran


@pytest.mark.parametrize("change", ["float64", "strided", "small", "subclass"])
def test_other_tensors_are_left_to_torch_ops(change):
    tensors = moving(9000 if change != "small" else 100, True, False, torch.float64 if change == "float64" else None)
    if change == "strided":
        tensors = tensors._replace(grad=torch.randn(18_000)[::2])
    if change == "subclass":
        tensors = tensors._replace(grad=tensors.grad.as_subclass(type("Other", (torch.Tensor,), {})))
    before = tensors.mean.clone()
    assert not step.step_(tensors, newest=1.0, ess=10.0, lr=0.1, precision_lr=0.5)
    assert_close(tensors.mean, before, **SAME)


def net_of(dtype=torch.float32):
    """One large weight, and small tensors that are large together."""
    torch.manual_seed(0)
    net = nn.Sequential(
        bl.BayesLinear(200, 100), nn.Tanh(), bl.BayesLinear(100, 100), nn.Tanh(), bl.BayesLinear(100, 2)
    )
    for site in bl.posterior(net):
        site.precision.mul_(torch.rand_like(site.precision) + 0.5)
    return net.to(dtype)


@pytest.mark.parametrize(("kind", "options"), [
    (bl.VOGN, {"lr": 1e-3}),
    (bl.VOGN, {"lr": 1e-3, "init_precision": "curvature", "beta1": 0.0, "clip_radius": 0.1}),
    (bl.OGN, {"lr": 1e-3}),
    (bl.IVON, {"lr": 1e-2}),
    (bl.IVON, {"lr": 1e-2, "estimator": "gradsq", "beta1": 0.0, "clip_radius": 0.1}),
    (bl.BBB, {"lr": 1e-2}),
], ids=str)  # fmt: skip
def test_training_by_kernels_is_training_by_torch_ops(kind, options, launches):
    def trained(on, dtype=torch.float32):
        use_numba(on)
        net = net_of(dtype)
        optimizer, source = kind(net, 20, **options), torch.Generator().manual_seed(3)
        x, y = torch.randn(6, 200, generator=source).to(dtype), torch.randint(2, (6,), generator=source)
        for _ in range(3):
            noise = {name: torch.randn(p.shape, generator=source).to(dtype) for name, p in net.named_parameters()}
            with optimizer.sampled(None if kind is bl.OGN else noise):
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict(), [own.get("momentum") for own in optimizer.state_dict()["state"].values()]

    found = trained(True)
    moves = 2 * 3  # of the large weight, and of all others together; BBB moves each large tensor alone
    assert launches.count("step of BBB" if kind is bl.BBB else "natural-gradient step") == moves
    assert launches.count("new precision") == (moves if kind is bl.IVON else 0)
    expected, exact = trained(False), trained(True, torch.float64)
    assert_close(found, expected, rtol=2e-4, atol=1e-5)
    assert_close(found, exact, rtol=2e-4, atol=1e-5, check_dtype=False)


def test_threads_sample_and_step_at_once():
    expected, found = {}, {}

    def work(into, seed):
        mean, precision = torch.zeros(20_000), torch.ones(20_000)
        out = torch.empty(20_000)
        for _ in range(20):
            StandardNormal(torch.Generator().manual_seed(seed)).sample_(out, mean, precision, None, None)
            tensors = step.Moving(mean, precision, None, out, out.square(), torch.tensor(0.0), torch.tensor(1.0))
            assert step.step_(tensors, newest=1.0, ess=10.0, lr=0.1, precision_lr=0.5)
        into[seed] = mean, precision

    for seed in range(4):
        work(expected, seed)
    threads = [threading.Thread(target=work, args=(found, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(found, expected, **SAME)


def everything_of(size):
    """Return what all kernels make of tensors of a size."""
    out, noise = torch.empty(size), torch.empty(size)
    mean, precision = torch.linspace(-1, 1, size), torch.linspace(0.5, 2, size)
    StandardNormal(torch.Generator().manual_seed(1)).sample_(out, mean, precision, None, noise)
    filled = StandardNormal(torch.Generator().manual_seed(2)).fill_(torch.empty(size))
    tensors = step.Moving(mean, precision, noise.clone(), out, out.square(), filled, torch.tensor(2.0))
    assert step.step_(tensors, newest=0.2, ess=10.0, lr=0.1, precision_lr=0.5)
    statistic = filled.clone()
    assert step.retract_(precision, statistic, precision.clone(), factor=0.1, weight=0.1, of_root=True)
    moments = {name: noise.square() for name in ("momentum", "second", "log_momentum", "log_second")}
    names = ("mean", "precision", "grad", "log_sigma_grad", "prior_mean", "prior_precision")
    posterior = dict(zip(names, (mean, precision, out, filled, torch.tensor(0.0), precision.clone()), strict=True))
    assert step.elbo_step_(posterior | moments, (10.0, 0.3, 0.1, 0.2, 0.1, 0.5))
    return [out, noise, filled, *tensors[:3], statistic, *moments.values()]


def test_threads_share_a_large_tensor_without_changing_a_value(monkeypatch):
    monkeypatch.setattr(numba_jit, "_SHARE", 10_000)
    found, threads = {}, torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found[count] = everything_of(50_003)
            norm, least = measure.norms([found[count]]), measure.smallest([found[count][4].abs() + 0.1])
            assert_close(norm[0], [float(x.norm()) for x in found[count]], rtol=1e-4, atol=0)
            assert least == [float((found[count][4].abs() + 0.1).min())]
    finally:
        torch.set_num_threads(threads)
    assert numba_jit._threads.cache_info().currsize == 1
    assert_close(found[1], found[3], **SAME)


@pytest.mark.parametrize("call", [
    lambda out, x: numba_draw.fill(out, torch.tensor(1), 0),
    lambda out, x: numba_draw.sample(out, x, x, True, None, torch.tensor(1), 0),
    lambda out, x: numba_measure.norm(out),
    lambda out, x: numba_measure.smallest(out),
    lambda out, x: numba_step.retract(x, out, x, 0.1, 0.1, True),
])  # fmt: skip
def test_what_a_thread_still_does_after_an_interruption_holds_its_tensors(call, monkeypatch):
    parts = []

    def interrupted(size, run, unit=1):
        parts.append(run)
        raise KeyboardInterrupt

    for module in (numba_draw, numba_measure, numba_step):
        monkeypatch.setattr(module, "in_parts", interrupted)
    out = torch.ones(9000)
    known = weakref.ref(out)
    with pytest.raises(KeyboardInterrupt):
        call(out, torch.ones(9000))
    del out
    gc.collect()
    assert known() is not None
    parts[0](0, 9000)
    parts.clear()
    gc.collect()
    assert known() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(numba_jit, "_SHARE", 10_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert len(numba_jit.in_parts(30_000, lambda start, count: start)) == 2
    child = os.fork()
    if child == 0:
        os._exit(0 if len(numba_jit.in_parts(30_000, lambda start, count: start)) == 2 else 1)
    for _ in range(100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child waits for threads that it has not got")
    assert status == 0


def test_machine_code_is_kept_in_the_users_cache_and_never_beside_the_source(tmp_path):
    code = """if True:
        import torch
        from bayeslayers.curvature.kernels.draw import StandardNormal
        StandardNormal().fill_(torch.empty(10_000))
        import numba
        print(repr(numba.config.CACHE_DIR))
    """
    beside = Path(numba_jit.__file__).parent
    before = {*beside.rglob("*.nbi")}
    variables = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    for name, place, kept in (
        ("XDG_CACHE_HOME", tmp_path / "cache", True),
        ("NUMBA_CACHE_DIR", tmp_path / "numba", True),
        ("XDG_CACHE_HOME", blocked, False),
    ):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**variables, name: str(place)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == repr(str(place) if name == "NUMBA_CACHE_DIR" else "")
        assert any(tmp_path.rglob("*.nbi")) == kept
        for path in tmp_path.rglob("*.nbi"):
            path.unlink()
    assert {*beside.rglob("*.nbi")} == before


def test_a_platform_without_numba_trains_by_torch_ops():
    code = """if True:
        import importlib.util, sys, warnings
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
        warnings.simplefilter("error")
        import torch, bayeslayers as bl
        net, x = bl.BayesLinear(100, 100), torch.randn(4, 100)
        optimizer = bl.VOGN(net, 4, lr=1e-3)
        with optimizer.sampled():
            net(x).square().mean().backward()
        optimizer.step()
        assert bl.predict(net, x, num_samples=2, method="sample").probs.isfinite().all()
        assert "numba" not in sys.modules and net.weight.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", code], check=True)
