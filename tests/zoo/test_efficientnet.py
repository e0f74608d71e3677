from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import zoo


@pytest.fixture(scope="module")
def whole():
    """Timm's network in evaluation, none of whose running means is its initial value."""
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
    return net


@pytest.fixture
def file(whole, tmp_path):
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(("stages", "channels"), [(5, 112), (7, 320)])
def test_the_features_are_those_of_timms_stages(stages, channels, whole, file):
    model = zoo.create("efficientnet_lite0", file, stages=stages, num_classes=3).eval()
    assert model.card.kwargs == {"stages": stages, "num_classes": 3}  # the card describes the network alone
    images = torch.rand(2, 3, 32, 32)
    large = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear")
    expected = whole.blocks[:stages](whole.bn1(whole.conv_stem((large - 0.5) / 0.5)))
    assert expected.shape[1] == channels and expected.std() > 0
    assert_close(model[:3](images), expected, rtol=1e-4, atol=1e-5)
    assert_close(model(images), model.output(expected.mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_weights_come_from_a_file_that_fits(file, tmp_path):
    with pytest.raises(ValueError, match="pretrained must be False or a file of weights for 'efficientnet_lite0', got"):
        zoo.create("efficientnet_lite0", True)
    with pytest.raises(FileNotFoundError, match=r"pretrained must be True, .*none.safetensors: no file"):
        zoo.create("efficientnet_lite0", str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"weights of .*must fit the encoder, got shape \(32, 3, 3, 3\)"):
        zoo.create("efficientnet_lite0", file, input_size=(1, 32, 32))
    with pytest.raises(TypeError, match=r"arguments of model 'efficientnet_lite0' must be among .*, got 'weights'"):
        zoo.create("efficientnet_lite0", weights=file)  # which a card could otherwise ask for
    with pytest.raises(ValueError, match="pretrained must be False for 'lenet5'"):
        zoo.create("lenet5", file)
