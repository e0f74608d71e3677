"""Posteriors stored in half precision."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.storage.posterior import halved, read_posterior


def network(seed=0):
    """A network whose posterior says something: random means, precisions of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(bl.BayesLinear(4, 16), bl.BayesBatchNorm1d(16), nn.ReLU(), bl.BayesLinear(16, 3))
    for site in bl.posterior(net):
        site.mean.data.normal_(generator=generator)
        site.precision.copy_(10 ** (1 + 3 * torch.rand(site.precision.shape, generator=generator)))
    net(torch.randn(50, 4, generator=generator))
    return net.eval()


def test_the_file_is_half_as_large_and_keeps_what_is_not_means_or_precisions(tmp_path):
    net = nn.Sequential(bl.BayesLinear(100, 100), bl.BayesBatchNorm1d(100))
    sizes = []
    for half in (False, True):
        bl.save_posterior(net, tmp_path / str(half), half=half)
        sizes.append((tmp_path / str(half) / "model.safetensors").stat().st_size)
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    stored = load_file(tmp_path / "True/model.safetensors")
    assert stored["0.weight"].dtype == torch.float16 and stored["0.weight_precision"].dtype == torch.bfloat16
    for name in ("1.running_mean", "1.running_var", "0.weight_prior_precision", "0.weight_prior_mean"):
        assert stored[name].dtype == torch.float32
    assert read_posterior(tmp_path / "True").half and not read_posterior(tmp_path / "False").half


def test_values_move_by_the_rounding_alone_and_the_dtype_stays(tmp_path):
    net, other = network(), network(1)
    bl.save_posterior(net, tmp_path / "half", half=True)
    bl.load_posterior(tmp_path / "half", other)
    for site, found in zip(bl.posterior(net), bl.posterior(other), strict=True):
        assert found.mean.dtype == found.precision.dtype == torch.float32
        assert_close(found.mean, site.mean, rtol=2**-11, atol=2**-24)
        assert_close(found.precision, site.precision, rtol=2**-8, atol=0)
        assert not torch.equal(found.mean, site.mean)
    bl.save_posterior(other, tmp_path / "again", half=True)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("half", "again")]
    assert_close(stored[1], stored[0], rtol=0, atol=0)  # rounding once is enough


def test_the_nll_changes_by_less_than_the_error_of_sampling(tmp_path):
    net = network()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 4, generator=generator)
    y = torch.distributions.Categorical(logits=net(x)).sample()
    bl.save_posterior(net, tmp_path / "half", half=True)
    other = network(1)
    bl.load_posterior(tmp_path / "half", other)

    def nll(model, seed):
        generator = torch.Generator().manual_seed(seed)
        return bl.evaluate(model, (x, y), num_samples=32, generator=generator).metrics["nll"]

    values = torch.tensor([nll(net, seed) for seed in range(8)], dtype=torch.float64)
    change = abs(nll(other, 0) - float(values[0]))  # of the same noise
    assert 0 < change < float(values.std()) / 2


def test_a_mean_beyond_the_range_of_float16_is_kept():
    tensors = {"weight": torch.tensor([1e5, 1.0]), "weight_precision": torch.tensor([1e8, 1e-6]), "bias": torch.ones(2)}
    found = halved(tensors, {"weight", "bias"})
    assert [found[name].dtype for name in tensors] == [torch.bfloat16, torch.bfloat16, torch.float16]
    assert all(tensor.isfinite().all() and (tensor > 0).all() for tensor in found.values())
    assert_close(found["weight"].float(), tensors["weight"], rtol=2**-8, atol=0)


def test_tensors_of_whole_numbers_and_of_16_bits_stay():
    tensors = {"weight": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3), "empty": torch.ones(0)}
    found = halved(tensors, {"weight", "empty"})
    assert found["weight"].dtype == torch.bfloat16 and found["count"].dtype == torch.int64
    assert found["empty"].dtype == torch.float16


def test_a_stored_half_that_is_not_positive_is_refused(tmp_path):
    net = bl.BayesLinear(2, 2)
    net.weight_precision.fill_(1e-45)  # 0 in bfloat16
    with pytest.raises(ValueError, match="must be > 0"):
        bl.save_posterior(net, tmp_path / "half", half=True)
        bl.load_posterior(tmp_path / "half", bl.BayesLinear(2, 2))
    assert net.weight_precision.min() > 0  # the network's own stay
