"""What a saved posterior says of itself: its likelihood, its licence, how to load it, and what was measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import bayeslayers as bl
import zoo
from bayeslayers.prediction.predict import METHODS
from bayeslayers.storage import card as cards
from bayeslayers.storage.card import LARGEST_INPUT, Card, card_from_json
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import read_card


class Net(nn.Module):
    def __init__(self, likelihood=None):
        super().__init__()
        self.hidden, self.output = bl.BayesLinear(4, 8), bl.BayesLinear(8, 2)
        if likelihood is not None:
            self.likelihood = likelihood

    def forward(self, x):
        return self.output(self.hidden(x).relu())


LIKELIHOODS = [bl.Categorical(), bl.Bernoulli(), bl.Gaussian(), bl.Gaussian(0.3)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_the_likelihood_is_stored_and_comes_back(likelihood, tmp_path):
    card = bl.save_posterior(Net(likelihood), tmp_path / "own")
    assert card.likelihood == likelihood.name
    assert card.likelihood_parameters == ({"variance": 0.3} if likelihood == bl.Gaussian(0.3) else {})
    net = Net()
    assert bl.load_posterior(tmp_path / "own", net) == card == net.card
    assert net.likelihood == likelihood
    assert bl.predict(net, torch.rand(3, 4), 2).likelihood == likelihood
    model = zoo.create("mlp", input_size=[4], widths=[3], num_classes=2)
    model.likelihood = likelihood
    bl.save_posterior(model, tmp_path / "zoo")
    assert zoo.load(tmp_path / "zoo").likelihood == likelihood
    bl.save_posterior(zoo.load(tmp_path / "zoo"), tmp_path / "again")  # and is not lost on the way
    assert zoo.load(tmp_path / "again").likelihood == likelihood


@pytest.mark.parametrize("given", ["gaussian", bl.Gaussian(0.3)], ids=str)
def test_a_likelihood_may_be_given_and_must_not_contradict_the_model(given, tmp_path):
    assert bl.save_posterior(Net(bl.Gaussian(0.3)), tmp_path / "a", likelihood=given).likelihood_parameters == {
        "variance": 0.3
    }
    bl.save_posterior(Net(), tmp_path / "b", likelihood=given)
    assert zoo.create("mlp").likelihood == bl.Categorical()  # which says no more than its card
    bl.save_posterior(zoo.create("mlp"), tmp_path / "c", likelihood=given)
    for folder in ("b", "c"):
        card = read_card(tmp_path / folder)
        parameters = {"variance": 0.3} if isinstance(given, bl.Gaussian) else {}
        assert (card.likelihood, card.likelihood_parameters) == ("gaussian", parameters)
    for own in (bl.Bernoulli(), bl.Gaussian(0.5)):
        with pytest.raises(
            ValueError, match=r"likelihood must be the model's, .*, got .*aussian.*Set model.likelihood"
        ):
            bl.save_posterior(Net(own), tmp_path / "no", likelihood=bl.Gaussian(0.3))
    with pytest.raises(ValueError, match=r"likelihood must be the model's, Bernoulli.*, got 'categorical'"):
        bl.save_posterior(Net(bl.Bernoulli()), tmp_path / "no", likelihood="categorical")
    with pytest.raises(
        ValueError, match=r"likelihood must be one that a card can name, bl.Categorical, .*, got Poisson"
    ):
        bl.save_posterior(Net(type("Poisson", (), {})()), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_card_of_an_older_release_loads(tmp_path):
    bl.save_posterior(Net(), tmp_path / "old")
    for name, expected in (("categorical", bl.Categorical()), ("gaussian", bl.Gaussian())):
        card = json.loads((tmp_path / "old/config.json").read_text()) | {"likelihood": name}
        for field in ("likelihood_parameters", "license"):
            card.pop(field, None)
        (tmp_path / "old/config.json").write_text(json.dumps(card))
        bl.load_posterior(tmp_path / "old", net := Net())
        assert net.likelihood == expected
    # It wrote "categorical" whatever the model said.
    (tmp_path / "old/config.json").write_text(json.dumps(card | {"likelihood": "categorical"}))
    bl.load_posterior(tmp_path / "old", net := Net(bl.Gaussian(0.3)))
    assert net.likelihood == bl.Gaussian(0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"likelihood_parameters": {"variance": 0}}, "variance must be a finite number > 0, got 0"),
        ({"likelihood_parameters": {"variance": float("nan")}}, "variance must be a finite number > 0, got nan"),
        ({"likelihood_parameters": {"variance": "x"}}, "must be numbers named variance, got 'variance': 'x'"),
        ({"likelihood_parameters": {"variance": True}}, "must be numbers named variance, got 'variance': True"),
        ({"likelihood_parameters": {"mean": 1.0}}, "must be numbers named variance, got 'mean': 1.0"),
        ({"likelihood": "bernoulli", "likelihood_parameters": {"variance": 1.0}}, "must be numbers named nothing, got"),
        ({"likelihood_parameters": []}, "bad field 'likelihood_parameters'"),
        ({"input_size": [3, 8000, 8000]}, f"'input_size': must be integers >= 1 whose product is at most {2**25}, got"),
        ({"method": "__class__"}, "'method': must be one of sample, .*, got '__class__'"),
        ({"input_size": [3, -2, -2]}, "'input_size': must be integers >= 1"),
        ({"notes": "x" * 200_000}, "'notes': must hold texts of at most 100000 characters, got one of 200000"),
        ({"kwargs": {"a": [[]] * 3 + [json.loads("[" * 40 + "]" * 40)]}}, "'kwargs': must be nested at most 32 levels"),
        ({"metrics": {str(n): 0.5 for n in range(2000)}}, "'metrics': must have at most 1000 entries, got 2000"),
    ],
)
def test_a_card_from_elsewhere_is_bounded(fields, message):
    with pytest.raises(bl.PosteriorError, match=message) as caught:
        card_from_json(json.dumps({"format_version": 1, "likelihood": "gaussian"} | fields), "config.json")
    assert len(str(caught.value)) < 300 and "Value error" not in str(caught.value)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_models_are_saved_and_loaded_under_their_own_names(wrap, tmp_path):
    net = Net(bl.Gaussian())
    bl.save_posterior(wrap(net), tmp_path / "p")
    bl.load_posterior(tmp_path / "p", other := Net())
    assert torch.equal(other.hidden.weight, net.hidden.weight) and other.likelihood == bl.Gaussian()
    bl.load_posterior(tmp_path / "p", wrapped := wrap(Net()))
    state = {name.partition("hidden.")[2]: tensor for name, tensor in wrapped.state_dict().items() if "hidden." in name}
    assert torch.equal(state["weight"], net.hidden.weight)
    model = zoo.create("mlp", input_size=[4], widths=[3])
    assert bl.save_posterior(wrap(model), tmp_path / "zoo").builder == "mlp"
    assert torch.equal(zoo.load(tmp_path / "zoo").output.weight, model.output.weight)


def test_tuples_and_numbers_of_numpy_are_stored_as_json_has_them(tmp_path):
    fields = {
        "class_names": ("a", "b"),
        "input_size": (3, np.int64(32), 32),
        "kwargs": {"sizes": ((1, 2), [(3,)])},
        "metrics": {"accuracy": np.float32(0.5), "test_examples": np.int32(7)},
        "dataset_size": np.int64(9),
    }
    card = bl.save_posterior(Net(), tmp_path / "p", **fields)
    assert card == Card(**{"name": "p", "likelihood_parameters": {}, "sha256": card.sha256} | fields)
    assert card == read_card(tmp_path / "p")
    assert (card.class_names, card.input_size, card.kwargs) == (["a", "b"], [3, 32, 32], {"sizes": [[1, 2], [[3]]]})
    assert (card.metrics, card.dataset_size) == ({"accuracy": 0.5, "test_examples": 7}, 9)
    assert bl.Card(class_names=("a",)).class_names == ["a"]
    assert bl.Card(input_size=(2**25,)).input_size == [LARGEST_INPUT]


def trained(optimizer, steps=20):
    torch.manual_seed(0)
    net, x = Net(), torch.rand(32, 4)
    y = (x.sum(1) > 2).long()
    optimizer = optimizer(net)
    for _ in range(steps):
        if isinstance(optimizer, bl.VOGN):
            with optimizer.sampled():
                cross_entropy(net(x), y).backward()
        else:
            cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    return net, (x, y)


def test_metrics_sampled_from_an_untrained_posterior_raise(tmp_path):
    net, data = trained(lambda net: torch.optim.Adam(net.parameters()))
    evaluation = bl.evaluate(net, data, num_samples=4)
    message = "posterior must be trained before it is evaluated, got precisions that are all 1000, the initial value"
    sampled = {"num_samples": 4, "seed": 0}
    for fields in (
        {"metrics": evaluation.metrics},
        {"metrics": {"accuracy": 0.5} | sampled},
        {"verification": {"nll": 0.5} | sampled},
        {"metrics": {"accuracy": 0.5} | sampled, "method": "linearised"},
    ):
        with pytest.raises(ValueError, match=message):
            bl.save_posterior(net, tmp_path / "p", **fields)
    net.zero_grad()
    with pytest.raises(ValueError, match=message):
        bl.save_posterior(net, tmp_path / "p", metrics={"accuracy": 0.5} | sampled)
    assert not (tmp_path / "p").exists()
    for method in ("mean", "dropout"):
        bl.save_posterior(net, tmp_path / "p", metrics={"accuracy": 0.5} | sampled, method=method)
    bl.save_posterior(Net(), tmp_path / "p")
    for written in (
        trained(lambda net: bl.VOGN(net, dataset_size=32))[0],
        bl.laplace(net, data, layers=bl.last_layer),
    ):
        assert bl.save_posterior(written, tmp_path / "q", metrics=evaluation.metrics | sampled).metrics["seed"] == 0


def test_a_users_card_declares_no_licence_for_them_and_promises_what_works(tmp_path):
    bl.save_posterior(Net(), tmp_path / "own")
    text = (tmp_path / "own/README.md").read_text()
    assert "license" not in text and "zoo.load" not in text and "import zoo" not in text
    assert 'bl.load_posterior("own", model)' in text
    bl.save_posterior(Net(), tmp_path / "own", license="mit")
    assert "license: mit" in (tmp_path / "own/README.md").read_text()
    bl.save_posterior(zoo.create("mlp"), tmp_path / "zoo")
    text = (tmp_path / "zoo/README.md").read_text()
    assert "license" not in text and 'zoo.load("zoo")' in text and "load_posterior" not in text
    for name in zoo.list_posteriors():  # ours
        assert "license: apache-2.0" in model_card(read_card(zoo.resolve(name)))


def test_how_a_posterior_predicts_is_not_lost(tmp_path):
    assert set(cards.METHODS) == set(METHODS)
    net = Net()
    bl.save_posterior(net, tmp_path / "p", method="linearised")
    assert bl.load_posterior(tmp_path / "p", other := Net()).method == "linearised"
    assert bl.save_posterior(other, tmp_path / "q").method == "linearised"


def test_a_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bl.save_posterior(zoo.create("mlp", widths=[2]), "~/mine")
    assert (tmp_path / "mine/config.json").is_file()
    assert read_card("~/mine") == bl.load_posterior("~/mine", zoo.create("mlp", widths=[2])) == zoo.load("~/mine").card


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
def test_what_could_not_be_loaded_is_not_saved(dtype, tmp_path):
    net = Net()
    net.register_buffer("odd", torch.ones(2).to(dtype))
    with pytest.raises(bl.PosteriorError, match="model: tensor 'odd' must be of real numbers, got "):
        bl.save_posterior(net, tmp_path / "p")
