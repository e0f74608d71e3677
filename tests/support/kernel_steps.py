"""The natural-gradient step of kernels beside that of torch ops, in whichever language the kernels are."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from bayeslayers.curvature.kernels import step
from bayeslayers.distributions.gaussian import natural_gradient_step_


def moving(size: int, momentum: bool, priors: bool, dtype: torch.dtype = torch.float32) -> step.Moving:
    """Return tensors of a step, with priors that are tensors or single values."""
    torch.manual_seed(0)
    mean, grad = torch.randn(2, size, dtype=dtype).unbind(0)
    precision, curvature = (torch.rand(2, size, dtype=dtype) + 0.1).unbind(0)
    prior = [torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype) + 0.5]
    if not priors:
        prior = [torch.tensor(0.3, dtype=dtype), torch.tensor(2.0, dtype=dtype)]
    average = torch.randn(size, dtype=dtype) if momentum else None
    return step.Moving(mean.clone(), precision.clone(), average, grad, curvature, *prior)


def assert_step_is_that_of_torch_ops(
    size: int, momentum: bool, priors: bool, clip_radius: float, precision_lr: float | None
) -> None:
    """Assert what a step changes, and that it is what torch ops make; without `precision_lr` of a given precision."""
    numbers = {"ess": 50.0, "lr": 0.1, "clip_radius": clip_radius}
    more = {} if precision_lr is None else {"precision_lr": precision_lr, "damping": 0.01, "curvature_scale": 0.5}
    fast, slow = moving(size, momentum, priors), moving(size, momentum, priors)
    versions = [None if x is None else x._version for x in fast]
    assert step.step_(fast, newest=0.2, **numbers, **more)
    average = slow.grad if slow.average is None else slow.average.lerp_(slow.grad, 0.2)
    prior = {"prior_mean": slow.prior_mean, "prior_precision": slow.prior_precision}
    if precision_lr is None:  # the curvature is the new precision
        slow.precision.copy_(slow.curvature)
        move = (50 * average + slow.prior_precision * (slow.mean - slow.prior_mean)) / slow.precision
        slow.mean.sub_(0.1 * move.clamp(-clip_radius, clip_radius))
    else:
        natural_gradient_step_(slow.mean, slow.precision, average, slow.curvature, **prior, **numbers, **more)
    assert_close(fast.mean, slow.mean, rtol=1e-5, atol=1e-5)
    assert_close(fast.precision, slow.precision, rtol=1e-6, atol=0)
    if momentum:
        assert_close(fast.average, slow.average, rtol=1e-5, atol=1e-6)
    changed = [None if x is None else x._version > before for x, before in zip(fast, versions, strict=True)]
    assert changed == [True, True, True if momentum else None, False, False, False, False]
