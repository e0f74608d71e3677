from __future__ import annotations

import pytest
import yaml

import bayeslayers as bl
from bayeslayers.storage.front_matter import front_matter
from bayeslayers.storage.model_card import is_generated, model_card


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"input_size": [1, 28, 28]}, "image-classification"),
        ({"input_size": [3, 8, 8], "builder": "smp:Unet/tu-resnet18"}, "image-segmentation"),
        ({"input_size": [3, 8, 8], "builder": "unet_small"}, "image-segmentation"),
        ({"input_size": [3, 8, 8], "metrics": {"miou": 0.5}}, "image-segmentation"),
        ({"input_size": [8]}, "tabular-classification"),
        ({"input_size": [2], "likelihood": "bernoulli"}, "tabular-classification"),
        ({"input_size": [8], "likelihood": "gaussian"}, "tabular-regression"),
        ({"input_size": [18], "builder": "text_lstm"}, "text-classification"),
        ({"input_size": [3, 8, 8], "likelihood": "gaussian"}, None),
        ({}, None),
    ],
)
def test_the_task_follows_from_inputs_network_and_likelihood(fields, task):
    metrics = {"accuracy": 0.5} | fields.get("metrics", {})
    head = yaml.safe_load(front_matter(bl.Card("p", **fields | {"dataset": "data", "metrics": metrics})))
    assert head.get("pipeline_tag") == task
    assert ("model-index" in head, head.get("model_name")) == ((True, None) if task else (False, "p"))
    if task:
        assert head["model-index"][0]["results"][0]["task"] == {"type": task}


def test_data_sets_are_linked_where_the_hub_has_them_and_tagged_where_not():
    def head(dataset):
        return yaml.safe_load(front_matter(bl.Card("p", dataset=dataset, input_size=[2], metrics={"rmse": 1.0})))

    known = head("cifar10 (50000 train, 8000 test)")
    assert known["datasets"] == ["uoft-cs/cifar10"] and known["tags"][3:] == ["cifar10"]
    result = known["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "uoft-cs/cifar10" and result["metrics"] == [{"type": "rmse", "value": 1.0}]
    assert head("ada/pets")["datasets"] == ["ada/pets"]
    blobs = head("blobs (100 train)")
    assert "datasets" not in blobs and blobs["tags"][3:] == ["blobs"]
    assert head("A: b")["tags"] == ["bayesian", "uncertainty", "variational-inference"]


def test_tags_name_network_data_and_method():
    card = bl.Card("p", builder="timm:resnet18", dataset="pets", optimizer={"name": "ivon", "laplace": {}})
    head = yaml.safe_load(
        front_matter(bl.Card(**vars(card) | {"base_model": "timm/resnet18.a1_in1k", "license": "mit"}))
    )
    assert head["tags"][3:] == ["resnet18", "pets", "ivon", "laplace"]
    assert (head["base_model"], head["license"], head["library_name"]) == (
        "timm/resnet18.a1_in1k",
        "mit",
        "bayeslayers",
    )


def test_a_generated_card_is_recognised_under_any_name_and_an_edited_one_is_not():
    card = bl.Card("p", builder="mlp", input_size=[2], notes="Notes.")
    other = bl.Card(**vars(card) | {"name": "ada/q"})
    for text in (model_card(card), model_card(other), model_card(other, picture=True)):
        assert is_generated(text, card)
    for text in ("", "# p\n", model_card(card) + "Mine.\n", model_card(card).replace("Notes", "My notes")):
        assert not is_generated(text, card)
    assert "![Picture of p](picture.png)" in model_card(card, picture=True) and "![" not in model_card(card)


def test_code_of_a_repository_downloads_what_zoo_cannot_build():
    adapters = model_card(bl.Card("ada/a", base_model="bert\x1b"))
    assert 'bl.load_adapters(zoo.download("ada/a"), model)' in adapters and "bert? with its adapters" in adapters
    own = model_card(bl.Card("ada/own"))
    assert 'bl.load_posterior(zoo.download("ada/own"), model)' in own and "import zoo" in own
    assert 'bl.load_posterior("own", model)' in model_card(bl.Card("own"))
