"""Inverses of damped matrices by their large eigenvalues, against eigenvalues and inverses in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.low_rank import Reduced, damped_inverse

DAMPING = 0.01


def damped(size: int, decay: float, dtype=torch.float64) -> torch.Tensor:
    """Return a matrix with eigenvalues exp(-decay i) + DAMPING in random directions."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(size, dtype=torch.float64)) + DAMPING
    return (basis * values @ basis.T).to(dtype)


def whole(inverse: Reduced) -> torch.Tensor:
    return inverse @ torch.eye(len(inverse.matrix), dtype=inverse.matrix.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_eigenvalues_are_within_the_tolerance_of_the_inverse(tolerance, dtype):
    matrix = damped(400, 0.2, dtype)
    found = damped_inverse(matrix, DAMPING, tolerance)
    assert found.matrix.shape[1] < 100
    root = torch.linalg.cholesky(matrix.double())
    ratios = torch.linalg.eigvalsh(root.T @ whole(found).double() @ root)  # of the inverse and the true one
    assert ratios.min() > 1 - tolerance - 1e-3
    assert ratios.max() < 1 + tolerance + 1e-3
    assert ratios.max() - ratios.min() > tolerance / 5  # which shows that something is left out


def test_products_are_those_with_the_inverse_from_both_sides():
    found = damped_inverse(damped(300, 0.3), DAMPING, 0.1)
    assert found.rest > 0
    left, right = torch.randn(5, 300, dtype=torch.float64), torch.randn(300, 7, dtype=torch.float64)
    dense = found.rest * torch.eye(300, dtype=torch.float64) - found.matrix @ found.matrix.T
    assert_close(found @ right, dense @ right)
    assert_close(left @ found, left @ dense)


@pytest.mark.parametrize(
    ("size", "decay", "tolerance"),
    [(400, 0.2, 0.0), (100, 0.5, 0.1), (400, 0.01, 0.1)],
    ids=["no tolerance", "small matrix", "slow decay"],
)
def test_inverse_is_whole_where_low_rank_does_not_pay(size, decay, tolerance):
    matrix = damped(size, decay)
    found = damped_inverse(matrix, DAMPING, tolerance)
    assert found.rest == 0
    assert_close(whole(found), torch.linalg.inv(matrix))


def test_damping_below_the_resolution_of_float32_gives_the_whole_inverse():
    matrix = damped(400, 0.2) - (DAMPING - 1e-7) * torch.eye(400, dtype=torch.float64)
    assert damped_inverse(matrix, 1e-7, 0.1).rest == 0


def test_matrix_of_damping_alone_is_inverted_without_any_direction():
    found = damped_inverse(2 * torch.eye(300), 2.0, 0.1)
    assert_close(whole(found), torch.eye(300) / 2)
    assert found.matrix.shape == (300, 0)


def test_matrix_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="must be positive definite"):
        damped_inverse(torch.full((300, 300), torch.inf), 0.1, 0.1)


def wide_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(bl.BayesLinear(300, 280), torch.nn.Tanh(), bl.BayesLinear(280, 2))


@pytest.mark.parametrize("method", [bl.KFAC, bl.NoisyKFAC])
def test_steps_with_low_rank_are_close_to_those_with_whole_inverses(method):
    x, y = torch.randn(64, 12) @ torch.randn(12, 300), torch.randn(64, 2)
    means = {}
    for tolerance in (0.0, 0.1):
        net = wide_net()
        before = net[0].weight.detach().clone()
        generator = torch.Generator().manual_seed(0)
        optimizer = method(net, 64, likelihood=bl.Gaussian(1.0), generator=generator, inverse_tolerance=tolerance)
        for _ in range(3):
            with optimizer.sampled():
                bl.Gaussian(1.0).loss(net(x), y).backward()
            optimizer.step()
        state = optimizer.state[net[0].weight]
        assert (state["input_inverse"].shape[1] < 300) is (tolerance > 0)
        means[tolerance] = net[0].weight.detach() - before
    assert (means[0.1] - means[0.0]).norm() < 0.1 * means[0.0].norm()
