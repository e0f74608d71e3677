from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import zoo
from zoo.encoder_weights import fill_encoder

NAME = "smp:Unet/tu-resnet10t"
SMALL = {"encoder_depth": 3, "decoder_channels": [8, 8, 4], "num_classes": 3, "input_size": [3, 32, 32]}


@pytest.fixture(scope="module")
def weights():
    """Weights of timm's network, with its last layer, none of which is its initial value."""
    import timm

    state = timm.create_model("resnet10t").state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def write(weights, path):
    save_file(weights, path)
    return str(path)


def test_a_file_of_weights_becomes_the_means_of_an_encoder(weights, tmp_path):
    model = zoo.create(NAME, write(weights, tmp_path / "w.safetensors"), **SMALL)
    own = model.network.encoder.state_dict()
    compared = [name for name in weights if f"model.{name}" in own]
    assert len(compared) > 40 and not any(name.startswith("fc.") for name in compared)
    for name in compared:
        assert_close(own[f"model.{name}"], weights[name])
    assert "pretrained" not in model.card.kwargs  # the card describes the network, not where its weights are
    plain = zoo.create(NAME, **SMALL).network.encoder.state_dict()
    assert not torch.equal(plain["model.conv1.0.weight"], own["model.conv1.0.weight"])


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused_with_the_file(damage, weights, tmp_path):
    if damage == "missing":
        changed = {name: tensor for name, tensor in weights.items() if name != "conv1.1.bias"}
        message = r"must be those of the encoder, got none for 'conv1\.1\.bias' \(1 of "
    else:
        changed = weights | {"conv1.0.weight": torch.zeros(3, 3)}
        message = r"must fit the encoder, got shape \(3, 3\) for 'model\.conv1\.0\.weight' of shape"
    with pytest.raises(ValueError, match=rf"weights of .*w\.safetensors {message}"):
        zoo.create(NAME, write(changed, tmp_path / "w.safetensors"), **SMALL)


def test_a_missing_file_and_one_that_could_run_code_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrained must be True, a name of weights or a file of them"):
        zoo.create(NAME, str(tmp_path / "none.pth"), **SMALL)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights must be a safetensors file, got .*weights\.pth: .*Convert one of"):
        zoo.create(NAME, str(tmp_path / "weights.pth"), **SMALL)


def test_the_name_of_an_encoders_weights_is_passed_on(monkeypatch):
    import segmentation_models_pytorch as smp

    asked = []

    class Unet(smp.Unet):
        def __init__(self, *args, encoder_weights, **kwargs):
            asked.append(encoder_weights)
            super().__init__(*args, encoder_weights=None, **kwargs)

    settings = {"input_space": "RGB", "input_range": [0, 1], "mean": [0.5] * 3, "std": [0.25] * 3}
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda *_: settings)  # which would download them
    monkeypatch.setitem(smp.MODEL_ARCHITECTURES_MAPPING, "unet", Unet)
    for given, expected in ((True, "imagenet"), ("imagenet", "imagenet"), ("swsl", "swsl"), (False, None)):
        zoo.create("smp:Unet/resnet18", given, **SMALL)
        assert asked.pop() == expected


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_other_libraries_take_no_name_of_weights(name):
    with pytest.raises(ValueError, match=r"pretrained must be True or False for .*'weights\.pth'"):
        zoo.create(name, "weights.pth")


def test_an_encoder_takes_its_own_names(weights):
    model = zoo.create(NAME, **SMALL).network.encoder
    own = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    fill_encoder(model, {**own, "head.weight": torch.zeros(2)}, "file")
    assert_close(dict(model.state_dict()), own)
