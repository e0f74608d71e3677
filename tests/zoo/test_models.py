"""The networks of the zoo: each builds, trains a step, and has the parameters its source says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.layers import FilterResponseNorm2d
from zoo.networks.norms import NORMS

SAME = {"rtol": 0, "atol": 0}
TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
SEGMENTATION = ["unet_small", "segnet_basic"]
DEEP_CIFAR = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet18_cifar"]
SMALL = {
    **{name: {"input_size": (3, 16, 16)} for name in DEEP_CIFAR},
    "wide_resnet": {"input_size": (3, 16, 16), "depth": 10, "width": 2},
    "wide_resnet28_10": {"input_size": (3, 8, 8)},
    "multi_head_mlp": {"input_size": (5,), "heads": 1},
}
# One small network of each family that takes a norm.
NORMED = {
    "resnet20": {"input_size": (3, 16, 16)},
    "resnet18": {"input_size": (3, 48, 48)},
    "wide_resnet": {"input_size": (3, 16, 16), "depth": 10, "width": 1},
    "vgg11": {"input_size": (3, 32, 32)},
    "unet_small": {"input_size": (3, 32, 32), "width": 4},
    "segnet_basic": {"input_size": (3, 32, 32)},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(name, **kwargs)


def create_on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name, **kwargs)


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_there_are_at_least_25_networks():
    assert len(zoo.list_models()) >= 25


def test_importing_the_zoo_is_cheap():
    heavy = ("torchvision", "timm", "segmentation_models_pytorch", "torchmetrics", "matplotlib")
    code = f"import sys, zoo; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The regressor, of real targets, and networks of words have tests of their own.
@pytest.mark.parametrize("name", [n for n in zoo.list_models() if n != "regressor" and not n.startswith("text_")])
def test_network_takes_a_step_of_vogn(name):
    net = create(name, num_classes=3, **{"input_size": (3, 32, 32), **SMALL.get(name, {})})
    assert next(iter(net.named_children()))[0] == "normalise"
    # Three examples: of two, BatchNorm over a single position keeps the sign, and no gradient passes.
    x = torch.rand(3, *net.card.input_size)
    y = torch.arange(3) if name not in SEGMENTATION else torch.randint(3, (3, *x.shape[2:]))
    sites = list(bl.posterior(net))
    assert {site.name for site in sites} == {parameter for parameter, _ in net.named_parameters()}
    before = [site.mean.detach().clone() for site in sites]
    # At this rate the old precision is forgotten, and what exceeds the prior's is the data's.
    optimizer = bl.VOGN(net, 10, lr=1.0, precision_lr=1.0, prior_precision=1e-12, init_precision=1e8)
    with optimizer.sampled():
        output = net(x)
        F.cross_entropy(output, y).backward()
    assert output.shape == ((3, 3, *x.shape[2:]) if name in SEGMENTATION else (3, 3))
    optimizer.step()
    assert [site.name for site, mean in zip(sites, before, strict=True) if torch.equal(site.mean, mean)] == []
    assert [site.name for site in sites if (site.precision == 1e8).any()] == []
    assert [site.name for site in sites if not (site.precision > site.prior_precision).any()] == []


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("lenet5", {}, 61_706),
        ("lenet5_mcdropout", {}, 61_706),
        ("lenet5_bn", {}, 61_706 + 226),  # a scale for each of the 226 hidden units; the shift is their bias
        ("alexnet", {}, 2_472_266),
        # Usual counts less the biases of the convolutions, which the norms make idle.
        ("vgg11", {}, 9_231_114 - 2_752),
        ("vgg13", {}, 9_416_010 - 2_944),
        ("vgg16", {}, 14_728_266 - 4_224),
        ("vgg19", {}, 20_040_522 - 5_504),
        ("resnet20", {}, 269_722),  # He et al. 2016, Table 6: .27, .46, .66, .85 and 1.7 million
        ("resnet20", {"shortcut": "B"}, 272_474),
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        ("resnet18_cifar", {}, 11_173_962),
        ("resnet18", {}, 11_689_512),
        ("wide_resnet28_10", {}, 36_479_194),  # Zagoruyko & Komodakis 2016, Table 4: 36.5 million
        ("wide_resnet", {"depth": 16, "width": 8}, 10_961_370),  # Table 4: 11.0 million
        ("unet_small", {"width": 64, "num_classes": 2}, 31_037_698),  # a usual U-Net with norms
        ("segnet_basic", {}, 1_416_075),
    ],
)
def test_parameters_are_as_many_as_published(name, kwargs, count):
    assert num_parameters(create_on_meta(name, **kwargs)) == count


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        counterpart = models.get_model(name)
    net = create_on_meta(name)
    own = {key: tensor.shape for key, tensor in net.state_dict().items()}
    assert own.items() >= {key: tensor.shape for key, tensor in counterpart.state_dict().items()}.items()
    assert num_parameters(net) == num_parameters(counterpart)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_checkpoint_loads_as_means(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    counterpart = models.get_model(name, weights=None, num_classes=5).eval()
    net = zoo.create(name, num_classes=5, input_size=(3, 64, 64)).eval()
    precision = net.conv1.weight_precision.clone()
    net.load_state_dict(counterpart.state_dict(), strict=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(net(x), counterpart(x), rtol=1e-5, atol=1e-6)
    assert_close(net.conv1.weight_precision, precision, **SAME)


def test_ordinary_checkpoint_leaves_the_normalisation():
    net = zoo.create("lenet5", mean=[0.3], std=[0.2])
    means = {name: p.detach() for name, p in net.named_parameters()}
    net.load_state_dict(means, strict=True)
    assert_close([net.normalise.mean.item(), net.normalise.std.item()], [0.3, 0.2])
    with pytest.raises(RuntimeError, match=r"Missing key.*normalise\.std"):
        net.load_state_dict({**means, "normalise.mean": net.normalise.mean})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NORMED)
def test_only_batch_norm_mixes_examples(name, norm):
    net = create(name, num_classes=3, norm=norm, **NORMED[name])
    x = torch.rand(3, *net.card.input_size)
    with torch.no_grad():
        batch, alone = net(x), net(torch.cat([x[:1], 1 - x[1:]]))
    if norm in ("batch", "plain_batch"):
        assert not torch.allclose(batch[0], alone[0], rtol=1e-3, atol=1e-4)
    else:
        assert_close(batch[0], alone[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(batch[1], alone[1], rtol=1e-3, atol=1e-4)


def test_plain_batch_norm_has_no_posterior_and_is_trained():
    net = create("resnet20", norm="plain_batch", input_size=(3, 8, 8))
    counterpart = create("resnet20", norm="batch", input_size=(3, 8, 8))
    norms = {name for name in counterpart.state_dict() if "bn" in name and "_pr" in name}
    assert norms and set(counterpart.state_dict()) - set(net.state_dict()) == norms
    optimizer = bl.VOGN(net, 4, lr=0.1, deterministic_lr=0.01)
    assert [(g["kind"], g["lr"]) for g in optimizer.param_groups] == [("bayesian", 0.1), ("deterministic", 0.01)]
    before = net.bn1.bias.clone()
    with optimizer.sampled():
        F.cross_entropy(net(torch.rand(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    assert_close((net.bn1.bias - before).abs().amax().item(), 0.01, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (64, 4), (512, 32), (24, 3), (6, 3), (7, 7)])
def test_group_norm_has_16_channels_a_group_where_they_fit(channels, groups):
    assert NORMS["group"].layer(channels).num_groups == groups


@pytest.mark.parametrize(("name", "size"), [("resnet20", 16), ("resnet50", 32), ("resnet18_cifar", 16)])
def test_zero_init_makes_a_block_its_shortcut(name, size):
    net = create(name, input_size=(3, size, size), zero_init=True)
    for block in (net.layer1[0], net.layer2[0]):
        x = torch.rand(2, block.conv1.in_channels, 8, 8)
        assert_close(block(x), block.downsample(x).relu(), **SAME)


def test_shortcut_a_subsamples_and_adds_channels_of_zeros():
    shortcut = zoo.create("resnet20").layer2[0].downsample
    x = torch.randn(2, 16, 5, 6)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 3, 3)], 1)
    assert_close(shortcut(x), expected, **SAME)
    assert [type(block.downsample) for block in zoo.create("resnet20").layer1] == [nn.Identity] * 3


@pytest.mark.parametrize("name", SEGMENTATION)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_segmentation_takes_any_height_and_width(name, norm):
    net = create(name, num_classes=4, norm=norm).eval()
    x = torch.rand(2, 3, 19, 38)
    with torch.no_grad():
        output = net(x)
        padded = net(F.pad(x, (0, 10, 0, 13)))  # the mean, which is 0 here, up to multiples of 16
    assert output.shape == (2, 4, 19, 38)
    assert padded.shape == (2, 4, 32, 48)
    assert_close(output, padded[..., :19, :38], **SAME)
    prediction = bl.predict(net, x, num_samples=2)
    assert_close(prediction.probs.sum(1), torch.ones(2, 19, 38))
    for wrong in (torch.rand(2, 4, 32, 32), torch.rand(3, 32, 32), torch.rand(2, 3, 0, 32)):
        with pytest.raises(ValueError, match=r"x must have the shape \(n, 3, h, w\), got"):
            net(wrong)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((1, 28, 28), r"x\.unsqueeze\(0\) is a batch of one"),
        ((5, 28, 28), r"x\.unsqueeze\(1\) adds the channel"),
        ((5, 1, 32, 32), r"zoo\.transforms\(model\) resizes images; zoo\.create\(\.\.\., input_size"),
    ],
)
def test_an_input_of_another_shape_is_told_what_to_do(shape, advice):
    with pytest.raises(ValueError, match=advice):
        zoo.create("lenet5")(torch.rand(shape))


def test_dropout_is_on_in_training_alone():
    net, x = create("lenet5_mcdropout", dropout=0.5), torch.rand(2, 1, 28, 28)
    assert not torch.equal(net(x), net(x))
    assert [module.p for module in net.modules() if isinstance(module, nn.Dropout)] == [0.5] * 4
    plain = zoo.create("lenet5")
    plain.load_state_dict(net.state_dict())
    assert_close(net.eval()(x), plain(x), **SAME)


def test_posterior_of_a_variant_is_rebuilt_from_its_card(tmp_path):
    net = create("wide_resnet", depth=10, width=1, norm="frn", input_size=[3, 16, 16], mean=[0.5], std=[0.25]).eval()
    bl.save_posterior(net, tmp_path / "wide")
    x = torch.rand(2, 3, 16, 16)
    assert_close(zoo.load(tmp_path / "wide")(x), net(x), **SAME)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "resnet20",
            {"norm": "bach"},
            "norm must be one of batch, plain_batch, group, frn, got 'bach'. Did you mean 'batch'",
        ),
        ("vgg11", {"norm": None}, "norm must be one of batch, plain_batch, group, frn, got None"),
        ("resnet18", {"shortcut": "C"}, "shortcut must be one of A, B, got 'C'"),
        ("resnet18", {"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ("unet_small", {"num_classes": 2.5}, "num_classes must be an integer >= 1, got 2.5"),
        ("unet_small", {"width": 0}, "width must be an integer >= 1, got 0"),
        ("wide_resnet", {"depth": 27}, "depth must be 6 n [+] 4 with n >= 1, .* got 27"),
        ("wide_resnet", {"depth": 4}, "depth must be 6 n [+] 4 with n >= 1, .* got 4"),
        ("wide_resnet", {"width": "wide"}, "width must be an integer >= 1, got 'wide'"),
        ("lenet5_mcdropout", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("lenet5_bn", {"input_size": (1, 30, 30)}, r"input_size must be \(c, 28, 28\) or \(c, 32, 32\), got"),
        ("alexnet", {"input_size": (3, 28, 28)}, r"input_size must be \(c, h, w\).* h, w >= 29, got \(3, 28, 28\)"),
        ("vgg16", {"input_size": (3, 32, 16)}, r"input_size must be \(c, h, w\).* h, w >= 32, got \(3, 32, 16\)"),
        ("resnet18", {"input_size": (224, 224)}, r"input_size must be \(c, h, w\).*, got \(224, 224\)"),
        ("resnet18", {"input_size": (0, 8, 8)}, r"input_size must be \(c, h, w\).* c >= 1 .*, got \(0, 8, 8\)"),
        ("segnet_basic", {"input_size": "rgb"}, r"input_size must be \(c, h, w\), integers .*, got 'rgb'"),
        ("efficientnet_lite0", {"input_size": (3, 32, 16)}, r"input_size must be a square .*, got \(3, 32, 16\)"),
        ("efficientnet_lite0", {"resize": 16}, "resize must be 1 to 8 times the side of an input"),
        ("efficientnet_lite0", {"stages": 8}, "stages must be 1 to 7, got 8"),
        ("segnet_basic", {"std": (0.2, 0.2)}, "std must have 1 or 3 values"),
        ("segnet_basic", {"std": (0.2, 0.0, 0.2)}, "std must be finite and > 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        zoo.create(name, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 3, 1, 7), (2, 3, 6, 6)])
def test_filter_response_norm_curvature_is_that_of_per_example_gradients(shape):
    torch.manual_seed(0)
    layer = bl.BayesFilterResponseNorm2d(3, eps=1e-3, dtype=torch.float64)
    weights = {"weight": torch.randn(3, dtype=torch.float64), "bias": torch.randn(3, dtype=torch.float64)}
    layer.load_state_dict(weights)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def potential(y):
        return (y.square() + y.sin()).sum()

    def by_hand(weights, x):
        x_hat = x / ((x * x).mean((-2, -1), keepdim=True) + 1e-3).sqrt()
        return x_hat * weights["weight"].reshape(3, 1, 1) + weights["bias"].reshape(3, 1, 1)

    per_example = vmap(grad(lambda w, x_i: potential(by_hand(w, x_i))), (None, 0))(weights, x.detach())
    with bl.tracked(layer) as tracker:
        (potential(layer(x)) / len(x)).backward()
    exact = {"rtol": 1e-10, "atol": 1e-12}
    assert_close(layer(x), by_hand(weights, x), **exact)
    squares = {name: leaf.grad * len(x) for name, leaf in tracker.leaves.items()}
    assert_close(squares, {name: g.square().mean(0) for name, g in per_example.items()}, **exact)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert_close(grads, {name: g.mean(0) for name, g in per_example.items()}, **exact)
    assert_close(x.grad, grad(lambda x: potential(by_hand(weights, x)) / len(x))(x.detach()), **exact)


def test_filter_response_norm_is_its_ordinary_twin():
    torch.manual_seed(0)
    counterpart, layer = FilterResponseNorm2d(3), bl.BayesFilterResponseNorm2d(3)
    assert isinstance(layer, FilterResponseNorm2d)
    nn.init.normal_(counterpart.weight), nn.init.normal_(counterpart.bias)
    layer.load_state_dict(counterpart.state_dict(), strict=True)
    assert_close(layer.weight_prior_mean, torch.tensor(1.0), **SAME)
    x = torch.randn(4, 3, 5, 5)
    assert_close(layer(x), counterpart(x), **SAME)
    draws = {"weight": torch.randn(6, 3), "bias": torch.randn(6, 3)}
    outputs = vmap(lambda weights: functional_call(layer, weights, (x,)))(draws)
    for i, output in enumerate(outputs):
        assert_close(output, functional_call(counterpart, {name: draw[i] for name, draw in draws.items()}, (x,)))


def test_filter_response_norm_squares_half_precision_in_float32():
    x = torch.randn(2, 3, 8, 8) * 1e3  # whose squares float16 cannot hold
    layer = bl.BayesFilterResponseNorm2d(3)
    assert_close(layer(x.half()), layer(x), rtol=5e-3, atol=5e-3, check_dtype=False)


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 2, 5, 5), (3, 5, 5)])
def test_filter_response_norm_refuses_a_shape_it_has_no_meaning_for(shape):
    with pytest.raises(ValueError, match=r"input must have the shape \(n, 3, h, w\) with h w > 1, got"):
        bl.BayesFilterResponseNorm2d(3)(torch.randn(shape))


def test_filter_response_norm_needs_a_positive_eps():
    with pytest.raises(ValueError, match="eps must be a finite number > 0, got 0"):
        bl.BayesFilterResponseNorm2d(3, eps=0.0)
