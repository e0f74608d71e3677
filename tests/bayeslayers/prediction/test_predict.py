from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(outputs=3, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(bl.BayesLinear(4, 8, init_precision=5.0), nn.Tanh(), bl.BayesLinear(8, outputs))
    return net.double()


def dense_network():
    torch.manual_seed(0)
    layers = bl.BayesConv2d(2, 4, 3, padding=1, init_precision=20.0), nn.ReLU(), bl.BayesConv2d(4, 3, 1)
    return nn.Sequential(*layers).double()


def inputs(*shape):
    return torch.randn(*shape, generator=generator(1), dtype=torch.float64)


def draws_of(net, x, num_samples, link):
    """The outputs of a plain loop over draws, (s, ...)."""
    source, outputs = generator(), []
    for _ in range(num_samples):
        with torch.no_grad(), bl.sampled(net, source):
            outputs.append(link(net(x)).numpy())
    return np.stack(outputs)


def entropy(probs, axis):
    return -(probs * np.log(probs)).sum(axis)


@pytest.mark.parametrize("num_samples", [7, 40])  # 40: merged in several parts
@pytest.mark.parametrize("net, x", [(network(), inputs(5, 4)), (dense_network(), inputs(2, 2, 5, 6))])
def test_classes_equal_a_plain_loop(net, x, num_samples):
    draws = draws_of(net, x, num_samples, lambda output: output.softmax(1))
    found = bl.predict(net, x, num_samples, generator=generator())
    mean, aleatoric = draws.mean(0), entropy(draws, 2).mean(0)
    assert_close(found.probs.numpy(), mean)
    assert_close(found.total.numpy(), entropy(mean, 1))
    assert_close(found.aleatoric.numpy(), aleatoric)
    assert_close(found.epistemic.numpy(), entropy(mean, 1) - aleatoric)
    assert_close(found.standard_error.numpy(), draws.std(0, ddof=1) / math.sqrt(num_samples))
    assert_close(found.labels.numpy(), mean.argmax(1))
    assert_close(found.confidence.numpy(), mean.max(1))
    assert (found.num_samples, len(found), found.likelihood) == (num_samples, len(x), bl.Categorical())
    assert found.total.shape == found.labels.shape == (x.shape[0], *x.shape[2:])


def test_yes_or_no_equals_a_plain_loop():
    net, x = network(1), inputs(5, 4)
    draws = draws_of(net, x, 6, torch.sigmoid)
    found = bl.predict(net, x, 6, likelihood=bl.Bernoulli(), generator=generator())
    mean, aleatoric = draws.mean(0), (entropy(draws, ()) + entropy(1 - draws, ())).mean(0)
    assert_close(found.probs.numpy(), mean)
    assert_close(found.aleatoric.numpy(), aleatoric)
    assert_close(found.epistemic.numpy(), entropy(mean, ()) + entropy(1 - mean, ()) - aleatoric)
    assert_close(found.labels.numpy(), (mean > 0.5).astype(int))
    assert_close(found.confidence.numpy(), np.maximum(mean, 1 - mean))


def test_real_target_with_predicted_variance_equals_a_plain_loop():
    net, x = network(2), inputs(5, 4)
    net.likelihood = bl.Gaussian()
    draws = draws_of(net, x, 6, lambda output: output)
    found = bl.predict(net, x, 6, generator=generator())
    assert_close(found.mean.numpy(), draws[:, :, :1].mean(0))
    assert_close(found.aleatoric.numpy(), np.exp(draws[:, :, 1:]).mean(0))
    assert_close(found.epistemic.numpy(), draws[:, :, :1].var(0))
    assert_close(found.total, found.aleatoric + found.epistemic)
    with pytest.raises(AttributeError, match="no probabilities"):
        _ = found.labels


@pytest.mark.parametrize("likelihood", [bl.Categorical(), bl.Bernoulli(), bl.Gaussian(), bl.Gaussian(0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncertainties_add_up_and_are_never_negative(likelihood, dtype):
    found = bl.predict(network(4).to(dtype), inputs(50, 4).to(dtype), 5, likelihood=likelihood, generator=generator())
    assert_close(found.total, found.aleatoric + found.epistemic)
    assert (found.epistemic >= 0).all() and (found.aleatoric >= 0).all()
    assert found.epistemic.max() > 1e-4


def test_linear_regression_has_its_analytic_predictive_variance():
    net = bl.BayesLinear(3, 1, bias=False).double()
    with torch.no_grad():
        net.weight_precision.copy_(torch.tensor([[0.5, 2.0, 30.0]]))
    x, num_samples = inputs(6, 3), 4000
    found = bl.predict(net, x, num_samples, likelihood=bl.Gaussian(0.1), generator=generator())
    mean, variance = x @ net.weight.detach().T, x.square() @ (1 / net.weight_precision).T
    assert ((found.mean - mean) / (variance / num_samples).sqrt()).abs().max() < 5
    assert ((found.epistemic - variance) / (variance * math.sqrt(2 / num_samples))).abs().max() < 5
    assert_close(found.standard_error, (found.epistemic / (num_samples - 1)).sqrt())
    assert_close(found.aleatoric, torch.full_like(variance, 0.1))


def test_memory_does_not_grow_with_the_number_of_draws(new_tensors):
    def tensors_alive_in_draw(number):
        counts, calls = [], iter(range(1, 100))

        def count(*_):
            if next(calls) == number:
                counts.append(len(new_tensors()))

        net = network()
        net.register_forward_hook(count)
        bl.predict(net, inputs(5, 4), number, sample_chunk=1)
        return counts[0]

    assert tensors_alive_in_draw(68) == tensors_alive_in_draw(20)  # outputs of up to 16 draws wait


def test_batches_share_each_draw():
    net, x = network(), inputs(7, 4)
    whole = bl.predict(net, x, 4, generator=generator())
    for batch_size in (1, 3, 100):
        parts = bl.predict(net, x, 4, generator=generator(), batch_size=batch_size)
        for name in ("mean", "total", "aleatoric", "epistemic", "standard_error"):
            assert_close(getattr(parts, name), getattr(whole, name))


def test_same_generator_same_prediction():
    net, x = network(), inputs(3, 4)
    first, second, other = (bl.predict(net, x, 3, generator=generator(seed)).mean for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    bl.predict(net, x, 3, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_method_mean_is_one_pass_with_the_means():
    net, x = network(), inputs(5, 4)
    found = bl.predict(net, x, 64, method="mean")
    assert_close(found.probs, net(x).detach().softmax(1))
    assert_close(found.epistemic, torch.zeros_like(found.epistemic))
    assert_close(found.total, found.aleatoric)
    assert found.num_samples == 1 and found.standard_error.isnan().all()


def test_one_draw_has_no_standard_error():
    assert bl.predict(network(), inputs(2, 4), 1).standard_error.isnan().all()


def test_nothing_of_the_model_changes():
    net, x = network(), inputs(5, 4)
    before, output = copy.deepcopy(net.state_dict()), net(x)
    found = bl.predict(net, x, 3)
    assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(net(x), output)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not found.mean.requires_grad


class Fail(nn.Module):
    def forward(self, x):
        raise ArithmeticError("no")


def modes(net):
    return {name: module.training for name, module in net.named_modules()}


@pytest.mark.parametrize("tail", [nn.Identity(), Fail()])
def test_each_module_gets_its_own_mode_back_also_after_an_exception(tail):
    net = nn.Sequential(network(), nn.Dropout(), nn.BatchNorm1d(3).double(), tail)
    net.train()[1].eval()
    before, statistics = modes(net), net[2].running_mean.clone()
    if isinstance(tail, Fail):
        with pytest.raises(ArithmeticError):
            bl.predict(net, inputs(5, 4), 2)
    else:
        bl.predict(net, inputs(5, 4), 2)
    assert modes(net) == before and before[""] and not before["1"]
    assert_close(net[2].running_mean, statistics)
    assert not any(module.drawn for module in net.modules() if isinstance(module, bl.BayesianLayer))


def test_dropout_and_batch_norm_are_in_eval_mode():
    plain = network()
    net = nn.Sequential(plain, nn.Dropout(0.9), nn.BatchNorm1d(3, eps=0.0).double()).train()
    x = inputs(5, 4)
    expected = bl.predict(plain, x, 3, generator=generator())  # a fresh norm's running statistics are 0 and 1
    assert_close(bl.predict(net, x, 3, generator=generator()).probs, expected.probs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be an integer >= 1, got 0"),
        ({"num_samples": -1}, ValueError, "num_samples must be an integer >= 1, got -1"),
        ({"num_samples": True}, ValueError, "num_samples must be an integer >= 1, got True"),
        ({"num_samples": 2.0}, ValueError, "num_samples must be an integer >= 1, got 2.0"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"x": inputs(0, 4)}, ValueError, r"at least one example in dimension 0, got shape \(0, 4\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"at least one example in dimension 0, got shape \(\)"),
        ({"x": torch.tensor([[1.0, math.nan, math.inf, 0.0]])}, ValueError, "x must be finite, got 2 of 4 values"),
        ({"x": np.zeros((2, 4))}, TypeError, "x must be a tensor, got ndarray"),
        ({"model": nn.Linear(4, 3)}, ValueError, "model must have Bayesian layers, got none"),
        ({"method": "mode"}, ValueError, "method must be one of 'auto', 'sample', .*, got 'mode'"),
        ({"method": "means"}, ValueError, "got 'means'. Did you mean 'mean'"),
        ({"sample_chunk": 0}, ValueError, "sample_chunk must be an integer >= 1, got 0"),
        ({"sample_chunk": "all"}, ValueError, "sample_chunk must be an integer >= 1, got 'all'"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a finite number > 0, got 0.0"),
        ({"tolerance": 0.1, "method": "mean"}, ValueError, "tolerance must be None for method 'mean'"),
        ({"tolerance": 0.1, "method": "moments"}, ValueError, "tolerance must be None for method 'moments'"),
        ({"antithetic": True, "method": "local"}, ValueError, "antithetic must be False for method 'local'"),
        ({"antithetic": True, "num_samples": 3}, ValueError, "num_samples must be even for antithetic pairs, got 3"),
        ({"method": "dropout"}, ValueError, "model must have nn.Dropout modules for method 'dropout', got none"),
        ({"x": []}, ValueError, "x must hold at least one batch, got none"),
        ({"x": [{"image": 1}]}, TypeError, "x must yield tensors x or batches .*, got dict"),
        ({"x": 3}, TypeError, "x must be a loader, another iterable of batches, or tensors, got int"),
        ({"x": [inputs(2, 4), inputs(0, 4)]}, ValueError, "x must hold at least one example"),
        ({"model": network(1)}, ValueError, "two or more classes in dimension 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        bl.predict(**{"model": network(), "x": inputs(2, 4)} | arguments)
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy_count_too():
    assert bl.predict(network(), inputs(2, 4), np.int64(3)).num_samples == 3


@pytest.mark.parametrize("method", ["mean", "moments", "sample"])
def test_an_open_scope_of_draws_does_not_reach_the_prediction(method):
    net, x = network(), inputs(3, 4)
    expected = bl.predict(net, x, 4, method=method, generator=generator()).mean
    with bl.sampled(net):
        assert_close(bl.predict(net, x, 4, method=method, generator=generator()).mean, expected, rtol=0, atol=0)


def test_draws_in_half_precision_are_averaged_in_single():
    torch.manual_seed(0)
    net, x = bl.BayesLinear(4, 3), inputs(5, 4)
    half = copy.deepcopy(net).bfloat16()
    prediction = bl.predict(half, x.bfloat16(), 64, generator=generator())
    assert prediction.mean.dtype == torch.float32
    assert_close(prediction.mean.sum(1), torch.ones(5), rtol=0, atol=1e-5)
