"""Inverses of damped matrices and their roots by large eigenvalues, against eigenvalues and inverses in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.distributions.low_rank import between, damped_inverse, inverse_with_root, large_eigenvalues
from bayeslayers.distributions.matrix_gaussian import correlated

pytestmark = pytest.mark.usefixtures("one_thread")
DAMPING = 0.01


def factor(size: int, decay: float, dtype=torch.float64) -> torch.Tensor:
    """Return a matrix with eigenvalues exp(-decay i) in random directions."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    return (basis * values @ basis.T).to(dtype)


def damped(matrix: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def ratios(inverse: torch.Tensor, damped_matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of an inverse relative to those of the true one."""
    lower = torch.linalg.cholesky(damped_matrix.double())
    return torch.linalg.eigvalsh(lower.T @ inverse.double() @ lower)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.01, 1e-4])
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_eigenvalues_are_within_the_tolerance_of_the_inverse(tolerance, damping, dtype):
    matrix = factor(400, 0.2, dtype)
    inverse, root = inverse_with_root(matrix, damping, 0.7 * damping, tolerance)
    covariance = root.whole().double() @ root.whole().double().T
    for found, added in ((inverse.whole(), damping), (covariance, 0.7 * damping)):
        relative = ratios(found, damped(matrix.double(), added))
        assert relative.min() > 1 - tolerance - 1e-2
        assert relative.max() < 1 + tolerance + 1e-2
        assert relative.max() - relative.min() > tolerance / 5  # which shows that something is left out
    assert inverse.matrix.shape[1] < root.matrix.shape[1] < 100
    assert_close(damped_inverse(matrix, damping, tolerance).whole(), inverse.whole(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("added", [0.01, 1e-4])
def test_root_is_exactly_that_of_the_reduced_inverse(added):
    spectrum = large_eigenvalues(factor(400, 0.2), added, 0.1)
    root, inverse = spectrum.inverse_root(added), spectrum.inverse(added)
    assert_close(root.whole() @ root.whole(), inverse.whole(), rtol=1e-9, atol=1e-9 / added)
    assert_close(root.whole(), root.whole().T)


def test_a_larger_damping_leaves_the_eigenvalues_that_stand_out_from_it():
    matrix = factor(400, 0.2)
    fewer, direct = (large_eigenvalues(matrix, d, 0.1).for_damping(0.1, 0.1) for d in (0.001, 0.1))
    values = torch.exp(-0.2 * torch.arange(400, dtype=torch.float64))
    means = values.flip(0).cumsum(0).flip(0) / torch.arange(400, 0, -1)
    count = int((values + 0.1 > 1.1 * (means + 0.1)).sum())
    assert len(fewer.values) == len(direct.values) == count
    assert_close(fewer.values, values[:count], rtol=1e-6, atol=0)
    assert_close(fewer.others, float(means[count]), rtol=1e-3, atol=0)
    assert_close(fewer.inverse(0.1).whole(), direct.inverse(0.1).whole(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("power", "tolerance", "missed"), [(1.0, 0.1, 0.03), (1.0, 0.3, 0.03), (0.5, 0.3, 0.3)])
def test_slow_spectra_are_reduced_to_what_stands_out_from_their_mean(power, tolerance, missed, dtype):
    """Eigenvalues of the noise in drawn weights fall slowly; of the slowest, random directions miss some."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64)).Q
    values = (torch.arange(400, dtype=torch.float64) + 1) ** -power
    matrix = (basis * values @ basis.T).to(dtype)
    inverse, root = inverse_with_root(matrix, 0.1, 0.07, tolerance)
    assert inverse.matrix.shape[1] <= root.matrix.shape[1] < 100
    for found, added in ((inverse.whole(), 0.1), (root.whole() @ root.whole().mT, 0.07)):
        relative = ratios(found, damped(matrix.double(), added))
        assert 1 - tolerance < relative.min() < relative.max() < 1 + tolerance + missed
        assert (relative - 1).square().mean().sqrt() < 0.7 * tolerance
        total = torch.linalg.inv(found.double()).trace()
        assert_close(total, damped(matrix.double(), added).trace(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tolerance", [0.1, 0.0], ids=["reduced", "whole"])
def test_products_are_those_with_all_entries_from_both_sides(tolerance):
    left, right = torch.randn(5, 300, dtype=torch.float64), torch.randn(300, 7, dtype=torch.float64)
    for found in inverse_with_root(factor(300, 0.3), DAMPING, DAMPING, tolerance):
        assert (found.rest > 0) is (tolerance > 0)
        dense = found.whole()
        if found.rest:
            assert_close(dense, found.rest * torch.eye(300, dtype=torch.float64) - found.matrix @ found.matrix.T)
        assert_close(found @ right, dense @ right)
        assert_close(left @ found, left @ dense)
        assert_close(found.scaled(0.3).whole(), 0.3 * dense)


@pytest.mark.parametrize(("outputs", "inputs"), [(300, 20), (20, 300), (300, 280)], ids=["tall", "wide", "both"])
def test_covariance_of_draws_is_the_kronecker_product_of_the_roots(outputs, inputs):
    (_, root_in), (_, root_out) = (
        inverse_with_root(factor(size, 0.3), DAMPING, DAMPING, 0.1) for size in (inputs, outputs)
    )  # fmt: skip
    assert (root_in.rest > 0, root_out.rest > 0) == (inputs > 200, outputs > 200)
    noise = torch.randn(outputs, inputs, dtype=torch.float64)
    assert_close(between(root_out, noise, root_in), correlated(noise, root_in.whole(), root_out.whole()))
    covariance = [root.whole() @ root.whole().T for root in (root_in, root_out)]
    for found, size in zip(covariance, (inputs, outputs), strict=True):
        relative = ratios(found, damped(factor(size, 0.3)))
        assert 0.9 < relative.min() <= relative.max() < 1.1


@pytest.mark.parametrize(
    ("size", "decay", "tolerance"),
    [(400, 0.2, 0.0), (100, 0.5, 0.1), (400, 0.01, 0.1)],
    ids=["no tolerance", "small matrix", "slow decay"],
)
def test_inverse_is_whole_where_low_rank_does_not_pay(size, decay, tolerance):
    matrix = factor(size, decay)
    inverse, root = inverse_with_root(matrix, DAMPING, DAMPING, tolerance)
    assert inverse.rest == root.rest == 0
    expected = torch.linalg.inv(damped(matrix))
    assert_close(inverse.whole(), expected)
    assert_close(damped_inverse(matrix, DAMPING, tolerance).whole(), expected)
    assert_close(root.whole() @ root.whole().T, expected)
    assert_close(root.whole(), root.whole().triu())


def test_step_can_be_reduced_where_the_root_is_whole():
    inverse, root = inverse_with_root(factor(400, 0.02), 0.5, 1e-4, 0.1)
    assert inverse.rest > root.rest == 0


def test_root_is_whole_where_nothing_is_drawn_with_it():
    matrix = factor(400, 0.2)
    inverse, root = inverse_with_root(matrix, 2 * DAMPING, DAMPING, 0.1, reduces_root=False)
    assert inverse.rest > root.rest == 0
    assert_close(root.whole() @ root.whole().T, torch.linalg.inv(damped(matrix)))


def test_directions_of_a_matrix_like_it_give_the_same_with_fewer_products():
    matrix, other = factor(400, 0.05), factor(400, 0.05) + 0.01 * factor(400, 0.01)
    start = large_eigenvalues(other, DAMPING, 0.3).inverse(DAMPING).matrix
    found = damped_inverse(matrix, DAMPING, 0.3, start)
    assert 64 < found.matrix.shape[1] < 150
    relative = ratios(found.whole(), damped(matrix))
    assert 0.7 < relative.min() < relative.max() < 1.31


def test_damping_below_the_resolution_of_float32_gives_the_whole_inverse():
    assert damped_inverse(damped(factor(400, 0.2), 1e-9), 1e-7, 0.1).rest == 0


def test_zero_matrix_is_inverted_without_any_direction():
    inverse, root = inverse_with_root(torch.zeros(300, 300), 2.0, 4.0, 0.1)
    assert_close(inverse.whole(), torch.eye(300) / 2)
    assert_close(root.whole(), torch.eye(300) / 2)
    assert inverse.matrix.shape == root.matrix.shape == (300, 0)


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


def trained_wide_net(steps: int = 3) -> tuple[torch.nn.Module, bl.NoisyKFAC]:
    net = wide_net()
    generator = torch.Generator().manual_seed(0)
    optimizer = bl.NoisyKFAC(net, 64, likelihood=bl.Gaussian(1.0), generator=generator, inverse_every=2)
    for step in range(steps):
        take_step(net, optimizer, step)
    return net, optimizer


def take_step(net: torch.nn.Module, optimizer: bl.NoisyKFAC, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 12, generator=generator) @ torch.randn(12, 300, generator=generator)
    with optimizer.sampled():
        bl.Gaussian(1.0).loss(net(x), torch.randn(64, 2, generator=generator)).backward()
    optimizer.step()


def drawn_change(net: torch.nn.Module, optimizer: bl.NoisyKFAC) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a draw adds to the first layer's weight, and what its roots make of the same noise."""
    noise = {name: torch.randn_like(parameter) for name, parameter in net.named_parameters()}
    with optimizer.sampled(noise=noise):
        inputs = torch.eye(300)
        change = (net[0](inputs) - net[0](torch.zeros(1, 300))).T - net[0].weight
    matrix = torch.cat([noise["0.weight"], noise["0.bias"][:, None]], 1)
    return change.detach(), correlated(matrix, *net[0].roots)[:, :300]


def test_draws_in_training_are_those_of_the_roots_that_the_layer_holds():
    net, optimizer = trained_wide_net()
    state = optimizer.state[net[0].weight]
    assert state["input_root_rest"] > 0
    assert state["input_root"].shape[1] < 100
    assert [tuple(root.shape) for root in net[0].roots] == [(301, 301), (280, 280)]
    assert_close(*drawn_change(net, optimizer), rtol=1e-4, atol=1e-4)
    net[0].roots[0].mul_(2)  # in place: other roots are the layer's, and the reduced ones are no longer used
    assert_close(*drawn_change(net, optimizer), rtol=1e-4, atol=1e-4)
    net[0].set_roots(torch.randn(301, 301), torch.randn(280, 280))
    assert_close(*drawn_change(net, optimizer), rtol=1e-4, atol=1e-2)


def test_resume_with_reduced_roots_is_exact():
    net, optimizer = trained_wide_net()
    resumed, second = trained_wide_net(steps=1)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    resumed.load_state_dict(saved[0]), second.load_state_dict(saved[1])
    for each, own in ((net, optimizer), (resumed, second)):
        for step in range(3, 6):
            take_step(each, own, step)
    for name, value in net.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
