"""Other libraries' networks: converted they compute the same, train, and say how unsure they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.per_example import EXACT, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close
from torchvision import models

import bayeslayers as bl
import zoo
from zoo import registry

SAME = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def torchvision_net(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, num_classes=5, **kwargs)


def timm_net(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def smp_net(name: str, encoder: str) -> Callable[[], nn.Module]:
    return lambda: smp.create_model(name, encoder, encoder_weights=None, classes=3)


def small_vit() -> nn.Module:
    return models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


# Builder, side of the images, share of the parameters that are Bayesian.
NETWORKS = [
    pytest.param(torchvision_net("resnet18"), 64, 1.0, id="torchvision:resnet18"),
    pytest.param(torchvision_net("resnet50"), 64, 1.0, id="torchvision:resnet50", marks=pytest.mark.slow),
    pytest.param(torchvision_net("mobilenet_v3_small"), 64, 1.0, id="torchvision:mobilenet_v3_small"),
    pytest.param(torchvision_net("efficientnet_b0"), 64, 1.0, id="torchvision:efficientnet_b0"),
    pytest.param(torchvision_net("swin_t"), 64, 1.0, id="torchvision:swin_t", marks=pytest.mark.slow),
    pytest.param(small_vit, 32, 1.0, id="torchvision:vit_small"),
    pytest.param(
        torchvision_net("vit_b_16", image_size=32), 32, 1.0, id="torchvision:vit_b_16", marks=pytest.mark.slow
    ),
    pytest.param(timm_net("resnet18"), 64, 1.0, id="timm:resnet18"),
    pytest.param(timm_net("convnext_atto"), 64, 1.0, id="timm:convnext_atto"),
    pytest.param(timm_net("vit_tiny_patch16_224", img_size=32), 32, 1.0, id="timm:vit_tiny_patch16_224"),
    pytest.param(timm_net("mobilenetv3_small_050"), 64, 1.0, id="timm:mobilenetv3_small_050"),
    pytest.param(timm_net("tf_mobilenetv3_small_075"), 65, 1.0, id="timm:tf_mobilenetv3_small_075"),
    pytest.param(smp_net("Unet", "resnet18"), 64, 1.0, id="smp:Unet/resnet18"),
    pytest.param(smp_net("DeepLabV3Plus", "resnet18"), 64, 1.0, id="smp:DeepLabV3Plus/resnet18"),
    pytest.param(smp_net("FPN", "mobilenet_v2"), 64, 1.0, id="smp:FPN/mobilenet_v2"),
    pytest.param(smp_net("Segformer", "mit_b0"), 64, 1.0, id="smp:Segformer/mit_b0"),
]


def without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        for probability in ("p", "drop_prob"):
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    return net


per_network = pytest.mark.parametrize(("make", "side", "coverage"), NETWORKS)


@per_network
def test_converted_backbone_is_the_backbone(make, side, coverage):
    torch.manual_seed(0)
    ordinary, x = make().eval(), torch.rand(2, 3, side, side)
    net, report = bl.to_bayesian(ordinary)
    assert_close(report.coverage, coverage, rtol=0, atol=5e-4)
    assert sum(entry.numel for entry in report.entries) == sum(p.numel() for p in ordinary.parameters())
    with torch.no_grad():
        output = net(x)
        assert_close(output, ordinary(x))
        assert_close(bl.to_deterministic(net)(x), output, **SAME)
    # Of the outputs: untrained, their softmax can be certain of one class under every draw.
    assert (bl.predict(net, x, num_samples=2, likelihood=bl.Gaussian(1.0)).epistemic > 0).all()


@per_network
def test_a_step_changes_every_converted_tensor(make, side, coverage):
    torch.manual_seed(0)
    net, report = bl.to_bayesian(without_dropout(make()))
    x = torch.rand(2, 3, side, side)
    # ConvNeXt scales its blocks by 1e-6: with a common rate float32 would round their first steps away.
    optimizer = bl.VOGN(net, dataset_size=1000, lr=1e3, precision_lr=0.1)
    before = {s.name: (s.mean.detach().clone(), s.precision.clone()) for s in bl.posterior(net)}
    assert list(before) == [entry.name for entry in report.entries if entry.status == "converted"]
    with optimizer.sampled():
        output = net(x)
        F.cross_entropy(output, torch.randint(3, (2, *output.shape[2:]))).backward()
    optimizer.step()
    for site in bl.posterior(net):
        mean, precision = before[site.name]
        assert not torch.equal(site.mean, mean), site.name
        assert not torch.equal(site.precision, precision), site.name


CREATED = [
    ("torchvision:mobilenet_v3_small", {"num_classes": 5, "input_size": (3, 32, 32), "dropout": 0.1}),
    ("torchvision:efficientnet_b0", {"num_classes": 5, "include": "classifier"}),
    ("timm:mobilenetv3_small_050", {"num_classes": 5, "in_channels": 1, "exclude": ["*.bn1", "conv_stem"]}),
    ("timm:vit_tiny_patch16_224.augreg_in21k", {"num_classes": 5, "input_size": [3, 32, 32], "init_precision": 9.0}),
    ("smp:Segformer/mit_b0", {"num_classes": 3, "mean": [0.1], "std": [2.0], "decoder_segmentation_channels": 32}),
    ("smp:Unet/tu-mobilenetv3_small_050", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), CREATED, ids=[name for name, _ in CREATED])
def test_created_network_survives_disk(name, kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", refuse_to_connect)
    model = zoo.create(name, **kwargs)
    for site in bl.posterior(model):
        site.precision.mul_(torch.rand_like(site.precision) + 0.5)
    card = bl.save_posterior(model, tmp_path / "posterior")
    assert card.builder == name
    assert json.loads(card.to_json())["kwargs"] == card.kwargs
    loaded = zoo.load(tmp_path / "posterior")
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **SAME)
    assert loaded.card.kwargs == card.kwargs
    x = torch.rand(1, *card.input_size)
    with torch.no_grad():
        assert_close(loaded(x), model.eval()(x), **SAME)
    assert model.conversion.entries == loaded.conversion.entries


def test_modules_load_by_the_version_they_were_saved_in(tmp_path):
    # MNASNet of an older version has a narrower stem: a state without versions is taken for one of those.
    net, _ = bl.to_bayesian(models.mnasnet0_5(num_classes=5))
    bl.save_posterior(net, tmp_path / "posterior")
    other, _ = bl.to_bayesian(models.mnasnet0_5(num_classes=5))
    bl.load_posterior(tmp_path / "posterior", other)
    assert_close(dict(other.state_dict()), dict(net.state_dict()), **SAME)
    x = torch.rand(1, 3, 32, 32)
    assert_close(other.eval()(x), net.eval()(x), **SAME)


FAMILIES = [
    *[
        f"torchvision:{name}"
        for name in (
            "convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s maxvit_t mnasnet0_5 mnasnet1_3 mobilenet_v2 "
            "mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
            "squeezenet1_1 swin_t swin_v2_t vit_b_16 wide_resnet50_2"
        ).split()
    ],
    *[
        f"timm:{name}"
        for name in (
            "cait_xxs24_224 convit_tiny convmixer_768_32 crossvit_tiny_240 cs3darknet_s densenet121 dla46_c "
            "edgenext_xx_small "
            "efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8 ghostnet_050 halonet26t hgnetv2_b0 inception_next_atto "
            "lcnet_035 levit_128s mambaout_femto mobilenetv3_small_050 mobileone_s0 mobilevit_xxs nf_regnet_b0 "
            "pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 repvgg_a0 resmlp_12_224 resnet10t rexnet_100 selecsls42 "
            "test_byobnet test_convnext test_efficientnet test_mambaout "
            "test_nfnet test_resnet test_vit tinynet_e "
            "xcit_nano_12_p16_224"
        ).split()
    ],
]
QUICK = (
    "torchvision:mnasnet0_5",
    "torchvision:shufflenet_v2_x0_5",
    "timm:test_byobnet",
    "timm:test_vit",
    "timm:test_resnet",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_survives_disk(name, tmp_path):
    model = zoo.create(name, num_classes=3).eval()
    for site in bl.posterior(model):
        site.precision.mul_(torch.rand_like(site.precision) + 0.5)
    card = bl.save_posterior(model, tmp_path / "posterior")
    loaded, x = zoo.load(tmp_path / "posterior"), torch.rand(1, *card.input_size)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **SAME)
    with torch.no_grad():
        assert_close(loaded(x), model(x), **SAME)


def refuse_to_connect(*args):
    raise AssertionError("a network must be built without a connection")


@pytest.mark.parametrize(
    "name", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050", "smp:FPN/mobilenet_v2"]
)
def test_network_is_created_without_memory(name):
    with torch.device("meta"):
        model = zoo.create(name)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.conversion.coverage == 1


def test_created_network_normalises_first():
    model = zoo.create("timm:vit_tiny_patch16_224", num_classes=5, input_size=(3, 32, 32)).eval()
    x = torch.rand(2, 3, 32, 32)
    assert_close(model(x), model.network((x - 0.5) / 0.5))
    assert model.card.input_size == [3, 32, 32]
    normalise = zoo.create("timm:mobilenetv3_small_050", in_channels=1).normalise
    assert_close(normalise.mean.flatten(), torch.tensor([(0.485 + 0.456 + 0.406) / 3]))
    normalise = zoo.create("torchvision:mobilenet_v3_small").normalise
    assert_close(normalise.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    assert normalise.size == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("torchvison:resnet18", {}, ValueError, "unknown library 'torchvison' .* Did you mean 'torchvision'"),
        ("torchvision:resnet19", {}, ValueError, "unknown torchvision classifier 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:fcn_resnet50", {}, ValueError, "unknown torchvision classifier"),
        ("timm:resnet_18", {}, ValueError, "unknown timm model 'resnet_18'. Did you mean 'resnet18'"),
        ("timm:hf-hub:someone/net", {}, ValueError, "unknown timm model 'hf-hub:someone/net'"),
        ("timm:local-dir:folder", {}, ValueError, "unknown timm model"),
        ("smp:unet/resnet18", {}, ValueError, "unknown smp architecture 'unet'. Did you mean 'Unet'"),
        ("smp:Unet", {}, ValueError, "unknown smp encoder ''"),
        ("smp:Unet/resnet1", {}, ValueError, "unknown smp encoder 'resnet1'. Did you mean 'resnet1"),
        ("smp:Unet/tu-nothing", {}, ValueError, "unknown timm encoder 'nothing'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, ValueError, "must get no argument 'weights'"),
        ("timm:resnet18", {"checkpoint_path": "x"}, ValueError, "must get no argument 'checkpoint_path'"),
        ("timm:resnet18", {"pretrained_cfg": "a1_in1k"}, ValueError, "must get no argument 'pretrained_cfg'"),
        ("smp:Unet/resnet18", {"encoder_weights": "imagenet"}, ValueError, "must get no argument 'encoder_weights'"),
        ("timm:resnet18", {"act_layer": nn.ReLU}, ValueError, "'act_layer' must be a plain value"),
        ("timm:resnet18", {"nothing": 3}, ValueError, "'timm:resnet18' could not be built with {'nothing': 3}"),
        ("timm:resnet18", {"include": nn.Linear}, ValueError, "'include' must be a plain value"),
        ("timm:resnet18", {"num_classes": 0}, ValueError, "num_classes must be an integer >= 1, got 0"),
        ("timm:resnet18", {"in_channels": 1, "input_size": (3, 32, 32)}, ValueError, "in_channels must be"),
        ("torchvision:resnet18", {"in_channels": 1}, ValueError, "torchvision's networks take 3 channels, got 1"),
        ("torchvision:vit_b_16", {"input_size": (3, 32, 48)}, ValueError, "take square images, got 32 x 48"),
        ("mlp", {"pretrained": True}, ValueError, "pretrained must be False for 'mlp'"),
    ],
)
def test_mistaken_requests_are_refused(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        zoo.create(name, **kwargs)


def test_windows_in_place_of_examples_are_unfolded():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "window_size": 4, "depths": (1, 1), "embed_dim": 12, "num_heads": (2, 4)}
    plain = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    net, x = bl.to_bayesian(without_dropout(plain).double())[0], torch.rand(3, 3, 32, 32, dtype=torch.float64)

    def loss(net, x):
        return potential(net(x))

    expected = squares_by_autograd(net, loss, x)
    found = tracked_squares(net, loss, x)
    assert_close(found, {name: expected[name] for name in found}, **EXACT)
    assert len(found) > 0.9 * len(expected)


def assert_means(model: nn.Module, weights: dict[str, torch.Tensor], but: str) -> None:
    """Assert that a network has ordinary weights as its means, those of the head excepted."""
    state = model.state_dict()
    assert_close(
        {k: state[k] for k in weights if not k.startswith(but)},
        {k: w for k, w in weights.items() if not k.startswith(but)},
        **SAME,
    )


def test_pretrained_torchvision_weights_become_the_means(monkeypatch):
    weights = models.mobilenet_v3_small().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: copy.deepcopy(weights)
    )
    model = zoo.create("torchvision:mobilenet_v3_small", pretrained=True)
    assert_means(model.network, weights, but="nothing")
    model = zoo.create("torchvision:mobilenet_v3_small", pretrained=True, num_classes=5)
    assert_means(model.network, weights, but="classifier.3")
    assert model.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 5)
    assert "pretrained" not in model.card.kwargs


def test_pretrained_timm_weights_become_the_means(monkeypatch):
    weights = timm.create_model("mobilenetv3_small_050").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: copy.deepcopy(weights))
    model = zoo.create("timm:mobilenetv3_small_050", pretrained=True, num_classes=5)
    assert_means(model.network, weights, but="classifier")
    assert "pretrained" not in model.card.kwargs


def test_pretrained_smp_encoder_becomes_the_means(monkeypatch, tmp_path):
    weights = smp.encoders.get_encoder("mobilenet_v2").state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    settings = {"mean": [10, 20, 30], "std": [40, 50, 60], "input_range": [0, 255], "input_space": "RGB"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.hf_hub_download", lambda *a, filename, **k: tmp_path / filename
    )
    model = zoo.create("smp:FPN/mobilenet_v2", pretrained=True)
    assert_means(model.network.encoder, weights, but="nothing")
    assert_close(model.normalise.mean.flatten(), torch.tensor([10, 20, 30]) / 255)
    assert_close(model.normalise.std.flatten(), torch.tensor([40, 50, 60]) / 255)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"input_space": "BGR"}))
    with pytest.raises(ValueError, match=r"pretrained must be False for encoder 'mobilenet_v2': .* BGR"):
        zoo.create("smp:FPN/mobilenet_v2", pretrained=True)


def test_a_card_downloads_nothing():
    for kwargs in ({"pretrained": True}, {"weights": "DEFAULT"}):
        card = bl.Card(builder="torchvision:mobilenet_v3_small", kwargs=kwargs)
        with pytest.raises(ValueError, match=r"must (not have the|get no) argument"):
            registry.rebuild(card)
    assert registry.rebuild(bl.Card(builder="mlp", kwargs={"num_classes": 3})).card.kwargs == {"num_classes": 3}


def test_a_posterior_that_asks_for_a_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse_to_connect)
    model = zoo.create("torchvision:mobilenet_v3_small", num_classes=5)
    card = bl.save_posterior(model, tmp_path / "posterior")
    path = tmp_path / "posterior" / "config.json"
    path.write_text(json.dumps(json.loads(card.to_json()) | {"kwargs": {**card.kwargs, "pretrained": True}}))
    with pytest.raises(bl.PosteriorError, match="must not have the argument 'pretrained'"):
        zoo.load(tmp_path / "posterior")
