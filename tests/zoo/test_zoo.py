from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.data.split import load_split
from recipes.reports.demo import ASSETS
from zoo.normalise import Normalise
from zoo.registry import describe, register

GREY = zoo.create("mlp", widths=[2], input_size=[1, 6, 8])
RGB = zoo.create("mlp", widths=[2], input_size=[3, 6, 8])


@pytest.mark.parametrize("name", ["lenet5", "mlp"])
def test_a_network_records_how_it_was_built(name):
    model = zoo.create(name, num_classes=3, mean=[0.5])
    card = zoo.card_of(model)
    assert (card.builder, card.kwargs, card.input_size) == (name, {"num_classes": 3, "mean": [0.5]}, [1, 28, 28])
    assert model.likelihood == bl.Categorical()
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 3)
    assert all(name.rpartition(".")[2] in ("weight", "bias") for name, _ in model.named_parameters())
    assert {name for name, _ in model.named_parameters()} == {site.name for site in bl.posterior(model)}


def test_lenet5_has_the_parameters_of_the_paper():
    assert sum(parameter.numel() for parameter in zoo.create("lenet5").parameters()) == 61_706
    assert zoo.create("lenet5", input_size=[3, 32, 32])(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
def test_mlp_computes_what_its_arguments_say(activation):
    model = zoo.create("mlp", widths=[3], input_size=[4], num_classes=2, activation=activation, mean=[0.5], std=[2.0])
    x = torch.rand(5, 4)
    function = getattr(torch.nn.functional, activation)
    hidden = function((x - 0.5) / 2 @ model.hidden1.weight.T + model.hidden1.bias)
    assert_close(model(x), hidden @ model.output.weight.T + model.output.bias)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zoo.create("lennet5"), ValueError, "unknown model 'lennet5'. Did you mean 'lenet5'"),
        (lambda: zoo.create("x" * 30), ValueError, r"unknown model 'x+'. zoo.list_models\(\) has them all"),
        (lambda: zoo.create("mlp", depth=3), TypeError, "among num_classes, input_size.* got 'depth'"),
        (lambda: zoo.create("mlp", widths=[0]), ValueError, "must be an integer >= 1, got 0"),
        (lambda: zoo.create("mlp", widths=[2.0]), ValueError, "must be an integer >= 1, got 2.0"),
        (lambda: zoo.create("mlp", num_classes=True), ValueError, "must be an integer >= 1, got True"),
        (lambda: zoo.create("mlp", activation="rely"), ValueError, "got 'rely'. Did you mean 'relu'"),
        (lambda: zoo.create("mlp", input_size=[0]), ValueError, "input_size must be an integer >= 1, got 0"),
        (lambda: zoo.create("mlp", input_size=[]), ValueError, "input_size must have one dimension or more"),
        (lambda: zoo.create("lenet5", input_size=[1, 30, 30]), ValueError, r"\(c, 28, 28\) or \(c, 32, 32\)"),
        (lambda: zoo.create("lenet5", num_classes=0), ValueError, "num_classes must be an integer >= 1, got 0"),
        (lambda: zoo.create("lenet5", std=[0.0]), ValueError, "std must be finite and > 0"),
        (lambda: zoo.create("lenet5", std=[math.nan]), ValueError, "std must be finite and > 0"),
        (lambda: zoo.create("lenet5", mean=[math.inf]), ValueError, "mean must be finite"),
        (lambda: zoo.create("lenet5", mean=[0.1, 0.2]), ValueError, "mean must have 1 or 1 values, .* got 2"),
        (
            lambda: zoo.load("lenet5-mnits"),
            ValueError,
            "posterior 'lenet5-mnits'.* Did you mean 'lenet5-mnist'",
        ),
        (lambda: zoo.load("no/such/folder"), ValueError, "unknown posterior 'no/such/folder'"),
        (lambda: zoo.transforms(nn.Linear(1, 1)), TypeError, "zoo.create or zoo.load, got a Linear without a card"),
    ],
)
def test_bad_names_and_arguments_are_one_sentence(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_second_network_of_the_same_name_is_refused():
    def lenet5():
        return nn.Linear(1, 1)

    with pytest.raises(ValueError, match="model name must be new, got 'lenet5' again"):
        register(lenet5)
    assert {"lenet5", "mlp"} <= set(zoo.list_models())
    assert zoo.list_models() == sorted(zoo.list_models())


def test_normalise_subtracts_and_divides_per_channel_in_its_own_precision():
    module = Normalise([3, 2, 2], [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    x = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert_close(module(x), expected.float())
    assert module(x.half()).dtype == torch.float32
    assert set(module.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 28, 28), ValueError, r"shape \(n, 1, 28, 28\), got \(2, 28, 28\)"),
        (torch.zeros(2, 3, 28, 28), ValueError, r"shape \(n, 1, 28, 28\), got \(2, 3, 28, 28\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"got \(2, 1, 32, 32\). zoo.transforms\(model\) resizes"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), TypeError, "floating point in .* got torch.uint8"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.complex64), TypeError, "floating point in .* got torch.complex64"),
    ],
)
def test_wrong_images_are_one_sentence(x, error, message):
    with pytest.raises(error, match=message):
        bl.predict(zoo.create("lenet5"), x, 1)


def pictures():
    """The same 6 x 8 picture in every dress, by name; two greys, or three colours."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    grey = colour[..., 0]
    unit = grey / 255
    return {
        "L": (Image.fromarray(grey), unit),
        "RGB": (Image.fromarray(colour), colour / 255),
        "RGBA, opaque": (Image.fromarray(np.dstack([colour, np.full_like(grey, 255)])), colour / 255),
        "RGBA, clear": (Image.fromarray(np.dstack([colour, np.zeros_like(grey)])), np.ones((6, 8, 3))),
        "LA": (Image.merge("LA", [Image.fromarray(grey), Image.new("L", (8, 6), 255)]), unit),
        "palette": (Image.fromarray(grey).convert("P"), unit),
        "I;16": (Image.fromarray(grey.astype(np.uint16) * 257), unit),
        "I": (Image.fromarray(grey.astype(np.int32) * 257), unit),
        "F": (Image.fromarray(unit.astype(np.float32)), unit),
        "1": (Image.fromarray(grey > 127), (grey > 127).astype(float)),
        "array (h, w)": (grey, unit),
        "array (h, w, c)": (colour, colour / 255),
        "array (c, h, w)": (colour.transpose(2, 0, 1), colour / 255),
        "array of floats": (colour / 255, colour / 255),
        "array of whole numbers": (grey.astype(np.int64), unit),
        "array of 16 bits": (grey.astype(np.uint16) * 257, unit),
        "array of truths": (grey > 127, (grey > 127).astype(float)),
        "array, upside down": (grey[::-1], unit[::-1]),
        "tensor (h, w)": (torch.tensor(grey), unit),
        "tensor (c, h, w)": (torch.tensor(colour).permute(2, 0, 1), colour / 255),
        "tensor (h, w, c)": (torch.tensor(colour), colour / 255),
        "tensor of floats": (torch.tensor(unit), unit),
    }


@pytest.mark.parametrize("name", list(pictures()))
@pytest.mark.parametrize("model", [GREY, RGB], ids=["grey", "rgb"])
def test_transforms_takes_any_picture(name, model):
    picture, unit = pictures()[name]
    if unit.ndim == 2:
        expected = np.stack([unit] * (1 if model is GREY else 3))
    else:
        expected = (unit @ [0.2989, 0.587, 0.114])[None] if model is GREY else unit.transpose(2, 0, 1)
    found = zoo.transforms(model)(picture)
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor(expected.copy()).float(), rtol=0, atol=1e-3)
    assert model(found[None]).shape == (1, 10)


def test_where_both_ends_could_be_channels_a_tensor_has_them_first_and_an_array_last():
    x = np.random.default_rng(0).random((3, 5, 3))
    convert = zoo.transforms(RGB)
    assert_close(convert(torch.tensor(x)), convert(x.transpose(1, 2, 0)))
    assert_close(convert(x), convert(x.transpose(2, 0, 1)))
    assert not torch.equal(convert(torch.tensor(x)), convert(x))


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (700, 500), (28, 28)])
def test_transforms_resizes_from_any_size(size):
    picture = Image.new("L", size, 51)
    assert_close(zoo.transforms(RGB)(picture), torch.full((3, 6, 8), 0.2))
    assert_close(zoo.transforms(GREY)(np.full(size, 0.2)), torch.full((1, 6, 8), 0.2))


def test_transforms_takes_the_middle_where_the_card_says_so():
    model = zoo.create("mlp", input_size=[1, 2, 3], widths=[4])
    x = torch.arange(36.0).reshape(1, 6, 6) / 36
    describe(model, dataclasses.replace(zoo.card_of(model), resize=6))
    assert_close(zoo.transforms(model)(x), x[:, 2:4, 1:4])


def test_transforms_takes_the_middle_of_other_proportions_as_training_does(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    model = zoo.create("mlp", input_size=[3, 20, 20], widths=[2])
    found = zoo.transforms(model)(picture)
    assert_close(found, zoo.transforms(model)(picture.crop((10, 0, 50, 40))))
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a/0.png")
    trained_on = load_split(f"imagefolder:{tmp_path}", None, train=True, size=[3, 20, 20]).inputs(slice(None))[0]
    # Inside the edges, where Pillow also sees what is cut off; the rest is the rounding of bytes.
    assert (found - trained_on)[:, :, 1:-1].abs().max() < 0.01


def test_transforms_gives_digits_back_as_they_are():
    digits = load_file(ASSETS)["digits"]
    convert = zoo.transforms(zoo.create("lenet5"))
    for digit in digits:
        assert_close(convert(Image.fromarray(digit.numpy())), digit[None].float() / 255)


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("digit.png", TypeError, "image must be a PIL image, an array or a tensor, got str"),
        (torch.zeros(2, 1, 28, 28), ValueError, r"1, 3 or 4 channels, got \(2, 1, 28, 28\)"),
        (np.zeros((5, 6, 2)), ValueError, r"1, 3 or 4 channels, got \(5, 6, 2\)"),
        (np.zeros((0, 6)), ValueError, r"got \(0, 6\)"),
        (np.full((6, 8), math.nan), ValueError, "must hold values from 0 to 1, got nan"),
        (np.full((6, 8), 255.0), ValueError, "must hold values from 0 to 1, got 255 to 255"),
        (np.full((6, 8), -1), ValueError, "must hold values from 0 to 255, got -1 to -1"),
        (np.full((6, 8), 1j), TypeError, "must hold real values"),
    ],
)
def test_what_is_no_picture_is_one_sentence(picture, error, message):
    with pytest.raises(error, match=message):
        zoo.transforms(GREY)(picture)


def test_transforms_needs_a_network_of_images():
    with pytest.raises(ValueError, match=r"must take grey or RGB images, got one for inputs of shape \(4,\)"):
        zoo.transforms(zoo.create("mlp", input_size=[4]))


@pytest.mark.parametrize("name", zoo.list_posteriors())
def test_a_bundled_posterior_loads_with_a_full_card(name):
    model, card = zoo.load(name), read_card(zoo.resolve(name))
    assert card == zoo.card_of(model) and card.name == name and not model.training
    assert card.builder in zoo.list_models() or ":" in card.builder
    for field in ("dataset", "dataset_size", "temperature", "optimizer", "recipe", "versions", "metrics", "baseline"):
        assert getattr(card, field), field
    assert {"num_samples", "seed"} <= set(card.metrics)
    assert not any(word.startswith("/") for word in f"{card.recipe} {card.notes}".split())
    assert (zoo.resolve(name) / "README.md").is_file()


def test_bundled_posteriors_are_small():
    files = [path for name in zoo.list_posteriors() for path in zoo.resolve(name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 40 * 10**6


@pytest.mark.parametrize("name", ["lenet5-mnist", "mlp-mnist"])
def test_a_digit_classifier_is_confident_on_digits_and_uncertain_on_articles(name):
    model = zoo.load(name)
    images = {kind: data[:, None].float() / 255 for kind, data in load_file(ASSETS).items()}
    digits, articles = (
        bl.predict(model, images[kind], 32, generator=torch.Generator().manual_seed(0))
        for kind in ("digits", "articles")
    )
    if name == "lenet5-mnist":
        assert_close(digits.labels, torch.arange(10))
    assert (digits.labels == torch.arange(10)).sum() >= 9
    assert digits.confidence.mean() > 0.9
    for part in ("total", "epistemic"):
        assert getattr(articles, part).mean() > 3 * getattr(digits, part).mean()
    assert articles.total.mean() > 0.5


def test_loading_a_bundled_posterior_needs_no_network_and_no_other_zoo():
    code = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, zoo, bayeslayers as bl
from bayeslayers.storage.posterior import read_card
for name in zoo.list_posteriors():
    card = read_card(zoo.resolve(name))
    if ":" not in card.builder:
        kind = torch.long if "text" in card.builder else torch.float
        bl.predict(zoo.load(name), torch.zeros(1, *card.input_size, dtype=kind), 1)
assert not {"timm", "segmentation_models_pytorch"} & set(sys.modules), "heavy"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-2.1, 2.6), (-1.0, 1.0), (0.0, 2.0)])
def test_images_of_another_range_warn_once(low, high):
    model, x = zoo.create("lenet5"), torch.linspace(low, high, 28 * 28).reshape(1, 1, 28, 28)
    good = torch.rand(1, 1, 28, 28)
    model(good)
    with pytest.warns(UserWarning, match=rf"x must hold images with values from 0 to 1, got {low:.4g} to {high:.4g}\."):
        model(x)
    model(x)  # a second warning would be an error
    for fine in (good, 1.4 * good - 0.2, torch.full_like(good, math.nan)):
        zoo.create("lenet5")(fine)
    zoo.create("mlp", input_size=[4])(torch.full((1, 4), 255.0))  # features have no range


def test_the_range_is_not_read_where_values_cannot_be(recwarn):
    bytes_ = torch.full((2, 1, 28, 28), 255.0)

    def model():
        return zoo.create("lenet5").eval()

    torch.vmap(model())(bytes_[:, None])
    torch.export.export(model(), (bytes_,)).module()(bytes_)
    torch.compile(model(), backend="eager", fullgraph=True)(bytes_)
    model().to("meta")(bytes_.to("meta"))
    torch.func.grad(lambda x: model()(x).sum())(bytes_)
    model()(bytes_[:0])
    assert not [warning for warning in recwarn.list if "x must hold images" in str(warning.message)]


def test_mode_i_means_what_its_range_says_and_f_is_from_0_to_1():
    grey = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    convert = zoo.transforms(GREY)
    expected = convert(grey)
    for array in (grey.astype(np.int32), grey / np.float32(255), grey.astype(np.int32) * 257):
        assert_close(convert(Image.fromarray(array)), expected, rtol=0, atol=1e-6)
    assert_close(convert(Image.fromarray(grey).convert("I")), expected)
    assert_close(convert(Image.fromarray(grey.astype(np.uint16))), expected / 257)  # 16 bits by its mode
    for array, message in (
        (np.full((6, 8), -1, np.int32), "must hold values from 0 to 65535, got -1 to -1"),
        (np.full((6, 8), 2**17, np.int32), "must hold values from 0 to 65535, got 131072 to 131072"),
        (np.full((6, 8), 9, np.float32), "must hold values from 0 to 1, got 9 to 9"),
        (np.full((6, 8), -0.5, np.float32), "must hold values from 0 to 1, got -0.5 to -0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(Image.fromarray(array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transforms_turns_an_image_upright(orientation, tmp_path):
    picture = np.full((30, 40, 3), 255, np.uint8)
    picture[:10], picture[:, :5] = (255, 0, 0), (0, 0, 255)
    upright = Image.fromarray(picture)
    stored = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # how cameras hold what they see
    sideways, tag = upright, Image.Exif()
    for method in stored[orientation]:
        sideways = sideways.transpose(Image.Transpose(method))
    tag[0x0112] = orientation
    sideways.save(tmp_path / "tagged.png", exif=tag)
    convert = zoo.transforms(zoo.create("mlp", input_size=[3, 15, 20]))
    with Image.open(tmp_path / "tagged.png") as image:
        assert_close(convert(image), convert(upright))
    assert (orientation == 1) == torch.equal(convert(sideways), convert(upright))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "array", "floats"])
def test_large_images_shrink_before_they_are_floats(mode):
    y, x = np.mgrid[:2400, :3000]
    picture = np.stack([y % 256, x % 256, (x + y) // 22], 2).astype(np.uint8)
    picture[1000:, 1000:, :2] = 40
    small = Image.fromarray(picture).resize((40, 32), Image.Resampling.BOX)  # of 2400 x 3000, of the same proportions
    large = {
        "RGB": lambda: Image.fromarray(picture),
        "RGBA": lambda: Image.fromarray(np.dstack([picture, np.full_like(picture[..., :1], 255)])),
        "array": lambda: picture,
        "floats": lambda: picture / 255,
    }[mode]()
    convert = zoo.transforms(zoo.create("mlp", input_size=[3, 8, 10], widths=[2]))
    assert_close(convert(large), convert(small), rtol=0, atol=0.02)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_an_image_that_claims_too_many_pixels_is_not_decoded(mode, tmp_path):
    Image.new(mode, (9400, 9400)).save(tmp_path / "bomb.png")
    with Image.open(tmp_path / "bomb.png") as image:
        image.load = None  # whoever decodes it calls this
        with pytest.raises(ValueError, match=r"9400 x 9400 pixels exceed the limit of 67108864"):
            zoo.transforms(RGB)(image)


@pytest.mark.parametrize(("size", "resize"), [([3, 224, 224], 225 * 8), ([3, 3000, 3000], 5000)])
def test_what_a_card_asks_to_resize_to_is_bounded(size, resize):
    model = zoo.create("mlp", input_size=[1, 2, 2], widths=[2])
    describe(model, dataclasses.replace(zoo.card_of(model), input_size=size, resize=resize))
    with pytest.raises(ValueError, match=r"resize must (be 1 to 8 times|give images of at most 33554432)"):
        zoo.transforms(model)
