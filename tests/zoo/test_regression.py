"""The network for tables: its units, its noise, and the curvature that VOGN takes of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.likelihoods import likelihood_of
from zoo.networks.regression import TargetScale
from zoo.registry import describe

SCALES = {"mean": [2.0, -1.0], "std": [3.0, 0.5], "target_mean": [100.0], "target_std": [20.0]}


def make_net(noise="learned", **options):
    torch.manual_seed(0)
    net = zoo.create("regressor", input_size=[2], widths=[6], noise=noise, **{**SCALES, **options})
    return describe(net, bl.Card(**{**vars(zoo.card_of(net)), "likelihood": "gaussian"}))


def unit_net(net):
    """Return the layers between the scales."""
    return torch.nn.Sequential(*[m for name, m in net.named_children() if name not in ("normalise", "target")])


def test_inputs_and_outputs_are_in_the_units_of_the_data():
    net, x = make_net(), torch.randn(5, 2)
    unit = unit_net(net)((x - torch.tensor([2.0, -1.0])) / torch.tensor([3.0, 0.5]))
    with torch.no_grad():
        net.target.log_variance.fill_(-1.0)
        mean, log_variance = net(x).chunk(2, 1)
    assert_close(mean, 100 + 20 * unit)
    assert_close(log_variance.exp(), torch.full((5, 1), 400 * torch.tensor(-1.0).exp().item()))


def test_the_density_in_the_units_of_the_data_differs_by_the_jacobian():
    net, x, y = make_net("predicted"), torch.randn(7, 2), 100 + 20 * torch.randn(7, 1)
    unit = unit_net(net)((x - torch.tensor([2.0, -1.0])) / torch.tensor([3.0, 0.5]))
    scaled = bl.Gaussian().loss(unit, (y - 100) / 20)
    assert_close(bl.Gaussian().loss(net(x), y), scaled + torch.tensor(20.0).log())


@pytest.mark.parametrize(("noise", "outputs"), [("learned", 4), ("predicted", 4), ("known", 2)])
def test_each_noise_has_its_outputs(noise, outputs):
    net = make_net(noise, num_targets=2, target_mean=[0.0, 5.0], target_std=[1.0, 2.0])
    assert net(torch.randn(3, 2)).shape == (3, outputs)
    assert ("target.log_variance" in net.state_dict()) == (noise == "learned")


def test_vogn_learns_the_noise_in_the_units_of_the_data():
    net, generator = make_net(target_mean=[0.0], target_std=[10.0]), torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    y = 10 * x[:, :1] + 4 * torch.randn(200, 1, generator=generator)
    options = {"prior_precision": 1.0, "init_precision": 1e4, "temperature": 0.1}
    optimizer = bl.VOGN(net, 200, 0.1, precision_lr=0.02, deterministic_lr=0.1, generator=generator, **options)

    def closure():
        optimizer.zero_grad()
        loss = bl.Gaussian().loss(net(x), y)
        loss.backward()
        return loss

    for _ in range(300):
        optimizer.step(closure)
    noise = bl.predict(net, x, 16, generator=generator).aleatoric.sqrt()
    assert 3.3 < float(noise.mean()) < 5.0 and float(noise.std()) < 1e-4


def test_saving_and_loading_return_units_and_noise(tmp_path):
    net, x = make_net(noise_std=0.3), torch.randn(4, 2)
    net.hidden1.weight_precision.uniform_(1e3, 2e3)
    bl.save_posterior(net, tmp_path / "saved")
    loaded = zoo.load(tmp_path / "saved")
    assert likelihood_of(loaded) == bl.Gaussian() and zoo.card_of(loaded).kwargs["target_std"] == [20.0]
    found = bl.predict(loaded, x, 8, generator=torch.Generator().manual_seed(1))
    expected = bl.predict(net, x, 8, generator=torch.Generator().manual_seed(1))
    assert_close((found.mean, found.total, found.aleatoric), (expected.mean, expected.total, expected.aleatoric))
    assert_close(found.aleatoric, torch.full((4, 1), 36.0))


def test_a_posterior_of_data_in_large_units_loads(tmp_path):
    prices = {"mean": [1.5e6, 40.0], "std": [9e5, 12.0], "target_mean": [4.5e8], "target_std": [2.5e8]}
    net, x = make_net(**prices), torch.tensor([[2e6, 30.0]])
    bl.save_posterior(net, tmp_path / "prices")
    assert_close(zoo.load(tmp_path / "prices")(x), net(x))


@pytest.mark.parametrize("noise", ["learned", "predicted"])
def test_vogn_squares_the_gradient_of_each_example_in_the_units_of_the_data(noise):
    net, x, y = make_net(noise).double(), torch.randn(9, 2).double(), 100 + 20 * torch.randn(9, 1).double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x, y):
        return bl.Gaussian().loss(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    squares = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    expected = {name: value.square().mean(0) for name, value in squares.items()}
    optimizer = bl.VOGN(net, 9, lr=0.0, precision_lr=1.0, init_precision=1e30, prior_precision=1e-9)
    with optimizer.sampled():
        bl.Gaussian().loss(net(x), y).backward()
    optimizer.step()
    for name in ("hidden1.weight", "hidden1.bias", "output.weight", "output.bias"):
        assert_close(net.get_buffer(f"{name}_precision"), 9 * expected[name] + 1e-9, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"noise": "learnt"}, "noise must be one of learned, predicted, known, got 'learnt'. Did you mean 'learned'"),
        ({"target_std": [0.0]}, "target_std > 0"),
        ({"target_mean": [float("nan")]}, "a finite number per target"),
        ({"target_mean": [1.0, 2.0]}, "target_mean and target_std must have 1 or 1 values"),
        ({"features": ["a"]}, "features must name all 2 features or none, got 1 names"),
        ({"activation": "rely"}, "Did you mean 'relu'"),
        ({"noise_std": 0.0}, "noise_std must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        zoo.create("regressor", input_size=[2], **options)


def test_target_scale_alone_has_the_noise_it_is_given():
    scale = TargetScale([0.0], [2.0], noise_std=0.5)
    assert_close(scale(torch.zeros(1, 1)), torch.tensor([[0.0, 0.0]]))
