"""Where a kernel runs, and what replaces one that cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from bayeslayers import curvature
from bayeslayers.curvature import Use
from bayeslayers.curvature.kernels import launch, squares, step, use_numba, use_triton
from bayeslayers.curvature.kernels.draw import StandardNormal
from bayeslayers.curvature.kernels.squares import convolution_squares, linear_squares

SAME = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def on():
    for use in (use_triton, use_numba):
        use()
    yield
    for use in (use_triton, use_numba):
        use()


@pytest.fixture
def on_cpu(monkeypatch):
    """Take the CPU for a GPU with Triton; its compiler finds no driver then, or tensors that are not on its device."""
    monkeypatch.setattr(launch, "LANGUAGES", {"cpu": "triton"})
    monkeypatch.setattr(launch, "_has", lambda language: True)


def linear_use():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, 4), torch.randn(5, 4)
    return Use((x,), (weight, None), (), (True, True, False, True, False)), torch.randn(3, 8, 5)


def test_the_squares_have_kernels_on_a_gpu_alone():
    assert curvature.LINEAR.kernel_for("cuda") is linear_squares
    assert curvature.CONVOLUTION.kernel_for("cuda") is convolution_squares
    for rule in (curvature.LINEAR, curvature.CONVOLUTION):
        assert rule.kernel_for("cpu") == rule.squares


def test_no_language_is_imported_before_a_kernel_runs():
    code = "import bayeslayers, sys; print({'triton', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_kernel_gets_the_tensors_of_its_device(on_cpu, monkeypatch):
    use, g = linear_use()
    seen = []

    def kernel(g, x, with_grad):
        seen.append((tuple(g.shape), tuple(x.shape), with_grad))
        return squares.Moments(torch.full((5, 4), 1.0), torch.full((5, 4), 2.0))

    monkeypatch.setattr(squares, "_linear", kernel)
    _, grad, _, of_squares, _ = linear_squares(use, g)
    assert seen == [((3, 8, 5), (3, 8, 4), True)]
    assert grad.eq(1).all() and of_squares.eq(2).all()
    use_triton(False)
    assert_close(list(linear_squares(use, g)), list(curvature.LINEAR.squares(use, g)), **SAME)
    assert len(seen) == 1


class Other(torch.Tensor):
    """A tensor of another class, as distributed ones are."""


def test_other_classes_of_tensors_see_torch_ops(on_cpu):
    assert launch.runs("any", torch.zeros(1), torch.nn.Parameter(torch.zeros(1)))
    assert not launch.runs("any", torch.zeros(1), torch.zeros(1).as_subclass(Other))


def test_a_platform_without_triton_is_not_warned(on_cpu, monkeypatch):
    monkeypatch.setattr(launch, "_has", lambda language: False)
    use, g = linear_use()
    assert_close(list(linear_squares(use, g)), list(curvature.LINEAR.squares(use, g)), **SAME)


def test_a_kernel_that_fails_is_replaced_with_one_warning(on_cpu, monkeypatch):
    def broken(*arguments):
        raise OSError("no compiler\nand more")

    monkeypatch.setattr(squares, "_linear", broken)
    use, g = linear_use()
    expected = list(curvature.LINEAR.squares(use, g))
    with pytest.warns(
        RuntimeWarning, match="'linear squares' must compile and run, got OSError: no compiler. Torch ops"
    ):
        assert_close(list(linear_squares(use, g)), expected, **SAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(list(linear_squares(use, g)), expected, **SAME)
    use_triton()
    with pytest.warns(RuntimeWarning, match="Turn the kernels off by bayeslayers.curvature.kernels.use_triton"):
        linear_squares(use, g)


def test_a_lack_of_memory_is_the_users(on_cpu, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(squares, "_linear", full)
    with pytest.raises(torch.OutOfMemoryError):
        linear_squares(*linear_use())


def test_every_kernel_has_torch_ops_behind_it(on_cpu, monkeypatch):
    """Triton itself fails here, whichever way: without a GPU there is no driver, with one the tensors are elsewhere."""
    monkeypatch.setattr(launch, "LARGE", {"triton": 1})
    use, g = linear_use()
    with pytest.warns(RuntimeWarning, match="'linear squares'"):
        assert_close(list(linear_squares(use, g)), list(curvature.LINEAR.squares(use, g)), **SAME)
    weight = torch.randn(4, 3, 3, 3)
    settings = squares.Settings((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    use = Use((torch.randn(2, 3, 5, 5),), (weight, None), settings, (True, True, False, True, False))
    g = torch.randn(2, 4, 5, 5)
    with pytest.warns(RuntimeWarning, match="'convolution squares'"):
        found = convolution_squares(use, g)
    assert_close(list(found), list(curvature.CONVOLUTION.squares(use, g)), **SAME)

    mean, precision, noise = torch.randn(200), torch.rand(200) + 0.1, torch.empty(200)
    source = StandardNormal(torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="'draw'"):
        source.fill_(noise)
    out = torch.empty(200)
    source.sample_(out, mean, precision, None, noise)
    assert_close(out, mean + noise * precision.rsqrt())
    source.sample_(out, mean, precision, precision.rsqrt(), None)
    assert abs(float(((out - mean) * precision.sqrt()).square().mean() - 1)) < 0.5

    tensors = step.Moving(mean, precision, None, noise, noise.square(), torch.tensor(0.0), torch.tensor(1.0))
    before = [x.clone() for x in tensors if x is not None]
    with pytest.warns(RuntimeWarning, match="'natural-gradient step'"):
        assert not step.step_(tensors, newest=1.0, ess=10.0, lr=0.1, precision_lr=0.5)
    assert_close([x for x in tensors if x is not None], before, **SAME)
    assert not step.step_(tensors, newest=1.0, ess=10.0, lr=0.1, precision_lr=0.5)


def test_kernels_take_tensors_of_one_order_in_memory():
    image = torch.zeros(2, 3, 4, 5)
    assert launch.in_one_order(image, image.clone())
    last = image.contiguous(memory_format=torch.channels_last)
    assert launch.in_one_order(last, last.clone()) and not launch.in_one_order(image, last)
    assert not launch.in_one_order(image.mT) and not launch.in_one_order(image[0, 0, 0].expand(3, 5))
    assert launch.in_one_order(torch.zeros(3)) and not launch.in_one_order(torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize("matmul", [False, True])
def test_products_are_as_exact_as_those_of_torch(matmul, monkeypatch):
    name = {False: "ieee", True: "tf32"}
    old = SimpleNamespace(
        cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=matmul)), cudnn=SimpleNamespace(allow_tf32=not matmul)
    )
    new = SimpleNamespace(
        fp32_precision="none",
        cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=name[matmul])),
        cudnn=SimpleNamespace(conv=SimpleNamespace(fp32_precision=name[not matmul])),
    )
    for backends in (old, new):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "backends", backends)
            found = [squares._precision(op) for op in ("matmul", "conv")]
        assert found == [name[matmul], name[not matmul]]
    assert {squares._precision(op) for op in ("matmul", "conv")} <= {"ieee", "tf32"}
