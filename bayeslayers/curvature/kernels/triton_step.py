"""A Triton kernel: the natural-gradient step of a diagonal Gaussian, in one pass over its memory."""

# pyright: reportArgumentType=false
# A parameter of type `tl.constexpr` takes a plain value.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_VALUES = 1024  # of a program


@triton.jit
def step_kernel(
    mean, precision, average, grad, curvature, prior_mean, prior_precision, size,
    newest, ess, lr, precision_lr, curvature_weight, damping, clip_radius,
    HAS_AVERAGE: tl.constexpr, IS_NEW_PRECISION: tl.constexpr, CLIPS: tl.constexpr,
    ONE_PRIOR_MEAN: tl.constexpr, ONE_PRIOR_PRECISION: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Move momentum average a, precision p and mean m, given gradient g, curvature c and prior N(m0, 1/p0).

        a <- (1 - newest) a + newest g
        p <- (1 - precision_lr) p + precision_lr p0 + curvature_weight c,  or the new precision that stands in c
        m <- m - lr clip((ess a + p0 (m - m0)) / (p + damping))

    It is `gaussian.natural_gradient_step_`; every term of the precision is non-negative there too.

    Source: Osawa et al. 2019 (arXiv 1906.02506), Eqs. 8 and 9; of the given precision Shen et al. 2024 (arXiv
    2402.17641), Algorithm 1.
    """
    places = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    own = places < size
    m = tl.load(mean + places, mask=own, other=0.0)
    a = tl.load(grad + places, mask=own, other=0.0)
    c = tl.load(curvature + places, mask=own, other=1.0)
    if HAS_AVERAGE:
        a = (1.0 - newest) * tl.load(average + places, mask=own, other=0.0) + newest * a
        tl.store(average + places, a, mask=own)
    if ONE_PRIOR_MEAN:
        m0 = tl.load(prior_mean)
    else:
        m0 = tl.load(prior_mean + places, mask=own, other=0.0)
    if ONE_PRIOR_PRECISION:
        p0 = tl.load(prior_precision)
    else:
        p0 = tl.load(prior_precision + places, mask=own, other=1.0)
    if IS_NEW_PRECISION:
        p = c
    else:
        p = tl.load(precision + places, mask=own, other=1.0)
        p = (1.0 - precision_lr) * p + precision_lr * p0 + curvature_weight * c
    tl.store(precision + places, p, mask=own)
    move = (ess * a + p0 * (m - m0)) / (p + damping)
    if CLIPS:
        move = tl.minimum(tl.maximum(move, -clip_radius), clip_radius)
    tl.store(mean + places, m - lr * move, mask=own)


def step(
    mean: Tensor, precision: Tensor, average: Tensor | None, grad: Tensor, curvature: Tensor, prior_mean: Tensor,
    prior_precision: Tensor, numbers: tuple[float, ...], is_new_precision: bool, clips: bool,
) -> None:  # fmt: skip
    """Launch the kernel.

    Args:
        mean: Mean, which fills its memory in one order, as all the tensors of its shape do; changed.
        precision: Precision; changed.
        average: Momentum average; changed. None for none.
        grad: Gradient.
        curvature: Curvature, or the new precision.
        prior_mean: Mean of the prior, one value or of the shape of `mean`.
        prior_precision: Precision of the prior, likewise.
        numbers: What the kernel takes from `newest` to `clip_radius`.
        is_new_precision: Whether `curvature` is the new precision.
        clips: Whether the move is bounded.
    """
    flags: Any = {
        "HAS_AVERAGE": average is not None,
        "IS_NEW_PRECISION": is_new_precision,
        "CLIPS": clips,
        "ONE_PRIOR_MEAN": prior_mean.numel() == 1,
        "ONE_PRIOR_PRECISION": prior_precision.numel() == 1,
        "VALUES": _VALUES,
    }
    size, before = mean.numel(), grad if average is None else average
    tensors = mean, precision, before, grad, curvature, prior_mean, prior_precision
    step_kernel[(triton.cdiv(size, _VALUES),)](*tensors, size, *numbers, **flags)
