"""A wrapper of torch around a network changes neither what its outputs mean nor what its posterior is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.export import FixedDraws
from bayeslayers.likelihoods import likelihood_of
from bayeslayers.unwrap import compiled_or_unwrapped, unwrapped


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": compiled,
    "nested": lambda model: compiled(nn.DataParallel(AveragedModel(model))),
    "outside": lambda model: AveragedModel(compiled(nn.DataParallel(model))),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def network(likelihood=None):
    torch.manual_seed(0)
    net = nn.Sequential(bl.BayesLinear(4, 5), nn.Tanh(), bl.BayesLinear(5, 2))
    if likelihood is not None:
        net.likelihood = likelihood
    return net


@each_wrapper
def test_wrappers_come_off_and_keep_the_likelihood(wrap):
    net = network(bl.Gaussian(0.3))
    wrapped = wrap(net)
    assert type(unwrapped(wrapped)) is nn.Sequential
    assert list(unwrapped(wrapped).state_dict()) == list(net.state_dict())
    assert likelihood_of(wrapped) == bl.Gaussian(0.3)
    assert likelihood_of(wrap(network())) == bl.Categorical()


@pytest.mark.parametrize("call", [bl.predict, lambda model, x: bl.evaluate(model, (x, x)), bl.save_posterior])
def test_what_is_no_network_is_refused(call):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str\. zoo\.load\(name\) loads a posterior"):
        call("lenet5-mnist", torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor\. Pass the model"):
        call(torch.zeros(2, 3), network())


def test_a_likelihood_of_the_wrapper_comes_first():
    wrapped = nn.DataParallel(network(bl.Gaussian()))
    wrapped.likelihood = bl.Bernoulli()
    assert likelihood_of(wrapped) == bl.Bernoulli()


def test_a_network_whose_layer_is_called_module_is_no_wrapper():
    class Halved(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x) / 2

    net = Halved(network())
    assert unwrapped(net) is net


def test_distributed_data_parallel_comes_off():
    net = network(bl.Bernoulli())
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert unwrapped(compiled(wrapped)) is net
    assert likelihood_of(wrapped) == bl.Bernoulli()


def test_the_compiled_forward_stays_unless_it_goes_through_a_wrapper():
    net = network()
    inner = compiled(net)
    assert compiled_or_unwrapped(inner) is inner
    assert compiled_or_unwrapped(nn.DataParallel(inner)) is inner
    assert compiled_or_unwrapped(compiled(nn.DataParallel(net))) is net
    assert compiled_or_unwrapped(net) is net


@each_wrapper
def test_the_card_is_that_of_the_network(wrap):
    model = zoo.create("lenet5")
    assert zoo.card_of(wrap(model)) == zoo.card_of(model)


X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24).view(12, 2) % 2


@each_wrapper
@pytest.mark.parametrize("method", ["sample", "mean", "local", "linearised", "moments", "dropout"])
def test_a_wrapped_network_predicts_what_it_predicts_alone(wrap, method):
    net = network(bl.Bernoulli())
    net = nn.Sequential(net[0], nn.ReLU(), nn.Dropout(0.5), net[2])
    net.likelihood = bl.Bernoulli()
    expected, found = (
        bl.predict(model, X, 8, method=method, generator=torch.Generator().manual_seed(1)) for model in (net, wrap(net))
    )
    assert found.likelihood == bl.Bernoulli()
    assert_close(found.mean, expected.mean)
    assert_close(found.epistemic, expected.epistemic)


@each_wrapper
def test_every_entrance_takes_the_network_inside(wrap):
    net = network(bl.Bernoulli())
    wrapped, data = wrap(net), (X, Y)

    def seeded():
        return torch.Generator().manual_seed(1)

    metrics = [bl.evaluate(model, data, num_samples=4, generator=seeded()).metrics for model in (net, wrapped)]
    assert metrics[0] == pytest.approx(metrics[1], nan_ok=True)
    assert bl.recalibrate(wrapped, data, num_samples=4).likelihood == "bernoulli"
    posterior = bl.laplace(wrapped, data, prior_precision=1.0)
    assert list(posterior.state_dict()) == list(net.state_dict()) and posterior.likelihood == bl.Bernoulli()
    merged = bl.merge([wrapped, wrapped], method="average")
    assert list(merged.state_dict()) == list(net.state_dict()) and merged.likelihood == bl.Bernoulli()
    assert_close(FixedDraws(wrapped, 4, generator=seeded())(X)[0], bl.predict(net, X, 4, generator=seeded()).mean)
    assert bl.KFAC(wrapped, dataset_size=12).likelihood == bl.Bernoulli()
    assert_close(bl.linearised_moments(wrapped, X)[1], bl.linearised_moments(net, X)[1])
