from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from support.small_posterior import uncertain

import bayeslayers as bl
import zoo
from recipes.reports.card_picture import card_picture


def loaded(folder, name, dataset, **kwargs):
    torch.manual_seed(0)
    bl.save_posterior(uncertain(zoo.create(name, **kwargs)), folder / "p", dataset=dataset)
    return zoo.load(folder / "p")


@pytest.mark.parametrize("name", ["mlp-gap", "mlp-energy", "mlp-blobs"])
def test_bundled_examples_give_the_same_picture_each_time(name):
    first, again = card_picture(zoo.load(name)), card_picture(zoo.load(name))
    assert first == again
    with Image.open(io.BytesIO(first)) as image:
        assert image.format == "PNG" and min(image.size) > 200 and len(first) < 500_000
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_a_users_network_of_bundled_data_is_drawn_and_named_classes_are_not_needed(tmp_path):
    model = loaded(tmp_path, "mlp", "mnist (60000 train)", widths=[4], input_size=[1, 28, 28])
    assert card_picture(model).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("dataset", "kwargs"),
    [
        ("pets (9 train)", {"input_size": [1, 28, 28]}),
        ("", {"input_size": [1, 28, 28]}),
        ("blobs", {"input_size": [7]}),
        ("energy", {"input_size": [1, 28, 28]}),
        ("gap", {"input_size": [1, 28, 28]}),
    ],
)
def test_examples_that_do_not_fit_are_not_drawn(tmp_path, dataset, kwargs):
    assert card_picture(loaded(tmp_path, "mlp", dataset, widths=[4], **kwargs)) is None
