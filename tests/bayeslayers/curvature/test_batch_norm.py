"""Batch normalisation by torch's own kernel: as op by op, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.layers import norms


def make_norm() -> bl.BayesBatchNorm2d:
    torch.manual_seed(0)
    norm = bl.BayesBatchNorm2d(3, momentum=0.3).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def run(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return all that a tracked pass gives: outputs, gradients, curvature and running statistics."""
    x = x.clone().requires_grad_()
    with bl.tracked(norm) as tracker:
        y = norm(x)
        (y.square() + y.sin()).sum().backward()
    grads = [p.grad for p in norm.parameters()]
    return [y.detach(), x.grad, *grads, *(leaf.grad for leaf in tracker.leaves.values()), *norm.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_the_kernel_gives_what_the_ops_one_by_one_give(training, shift, monkeypatch):
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64) + shift
    found = run(make_norm().train(training), x)
    monkeypatch.setattr(norms, "_fuses", lambda *_: False)
    assert_close(found, run(make_norm().train(training), x), rtol=1e-8, atol=1e-8)


def test_the_backward_pass_keeps_the_input_alone():
    norm, x, kept = make_norm(), torch.randn(6, 3, 4, 5, dtype=torch.float64, requires_grad=True), {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape == x.shape:
            kept[saved.data_ptr()] = saved
        return saved

    with bl.tracked(norm), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        norm(x).sum().backward()
    assert list(kept) == [x.data_ptr()]


def test_a_single_value_a_channel_is_refused_as_by_torch():
    norm = bl.BayesBatchNorm1d(3)
    with bl.tracked(norm), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(torch.randn(1, 3))


def test_mixed_dtypes_run_op_by_op():
    norm, x = make_norm().float(), torch.randn(6, 3, 4, 5).bfloat16()
    with bl.tracked(norm) as tracker:
        norm(x).float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.min() > 0 for leaf in tracker.leaves.values())
