"""Networks of torchvision, timm and segmentation-models-pytorch by name, converted to Bayesian layers.

Names are looked up in the library's own list, and arguments are plain values: nothing in a downloaded
card is imported, fetched or executed. The libraries are imported when they are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one, did_you_mean
from bayeslayers.layers import DEFAULT_INIT_PRECISION, DEFAULT_PRIOR_PRECISION
from bayeslayers.storage.card import Card
from zoo.encoder_weights import fill_encoder, read_weights
from zoo.normalise import Normalise, image_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PATTERNS, _CHARACTERS = 1000, 100_000  # name patterns of layers, and their total length
# Arguments of the libraries that fetch or read files, or make a network return more than its outputs.
_REJECTED = ("pretrained", "weights", "checkpoint", "cache_dir", "encoder_weights", "features_only", "aux_params")


class Source(NamedTuple):
    """What a library knows about one of its networks.

    Attributes:
        make: Builds it, called as `make(num_classes, size, arguments)`.
        size: Shape of one example, `(c, h, w)`.
        mean: Mean of the inputs per channel, for normalisation.
        std: Standard deviation of the inputs per channel, likewise.
        any_size: Whether it takes images of other heights and widths too.
        num_classes: Default number of outputs.
    """

    make: Callable[[int, tuple[int, int, int], dict[str, Any]], nn.Module]
    size: tuple[int, int, int] = (3, 224, 224)
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    any_size: bool = False
    num_classes: int = 1000


def build(
    name: str,
    pretrained: bool | str = False,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    prior_precision: float = DEFAULT_PRIOR_PRECISION,
    init_precision: float = DEFAULT_INIT_PRECISION,
    **arguments: Any,
) -> tuple[nn.Module, Card]:
    """Build a library's network, convert it, and put input normalisation in front.

    Args:
        name: "torchvision:NAME", "timm:NAME", or "smp:ARCHITECTURE/ENCODER".
        pretrained: Load the library's weights, which it downloads, as means. The card does not record this. For
            segmentation also the name of an encoder's weights, or a file of them, see `zoo.encoder_weights`.
        num_classes: Outputs; None for 1000, and 2 for segmentation.
        in_channels: Channels of the input; None for those of `input_size`, else 3.
        input_size: Shape of one example; None for that of the library's weights.
        mean: Mean of the inputs per channel; None for that of the library's weights.
        std: Standard deviation of the inputs per channel, likewise.
        include: Name patterns of `bayeslayers.to_bayesian`, in the library's names.
        exclude: Name patterns, likewise.
        prior_precision: Precision of every prior.
        init_precision: Precision of the posterior at the start.
        arguments: Further arguments of the library's network, plain values.

    Returns:
        The network, whose `conversion` is the report, and its card.

    Raises:
        ValueError: If the name is unknown, an argument is not allowed or not a plain value, or the
            library cannot build the network with these arguments.
    """
    library, _, network = name.partition(":")
    if library not in LIBRARIES:
        raise ValueError(f"unknown library {library!r} in model {name!r}.{did_you_mean(library, LIBRARIES)}")
    chosen = {"include": include, "exclude": exclude}
    _check_arguments(name, {**arguments, **chosen})
    for key, value in chosen.items():
        _check_patterns(key, [value] if isinstance(value, str) else value or [])
    source = LIBRARIES[library](network, pretrained)
    size = _size(source.size, in_channels, input_size)
    classes = at_least_one("num_classes", source.num_classes if num_classes is None else num_classes)
    try:
        plain = source.make(classes, size, arguments)
    except Exception as error:
        if pretrained:  # the error may be a failed download
            raise
        raise ValueError(f"model {name!r} could not be built with {arguments}: {error}") from error
    net, report = bl.to_bayesian(plain, include, exclude, prior_precision, init_precision)
    normalise = Normalise(
        size,
        _per_channel(source.mean, size[0]) if mean is None else mean,
        _per_channel(source.std, size[0]) if std is None else std,
        source.any_size,
    )
    model = nn.Sequential(OrderedDict(normalise=normalise, network=net))
    model.__dict__.update(conversion=report)
    given = {**chosen, "mean": mean, "std": std}
    precisions = {"prior_precision": prior_precision, "init_precision": init_precision}
    kwargs = {"num_classes": classes, "input_size": size, **precisions, **arguments}
    kwargs |= {key: value for key, value in given.items() if value is not None}
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return model, Card(name=name, builder=name, kwargs=kwargs, input_size=list(size))


def _check_arguments(name: str, arguments: dict[str, Any]) -> None:
    for key, value in arguments.items():
        if key.startswith(_REJECTED):
            raise ValueError(
                f"model {name!r} must get no argument {key!r}. pretrained=True loads the library's weights."
            )
        values = value if isinstance(value, list | tuple) else [value]
        if not all(item is None or isinstance(item, bool | int | float | str) for item in values):
            raise ValueError(f"argument {key!r} must be a plain value or a list of plain values, got {value!r}.")


def _check_patterns(argument: str, patterns: Sequence[str]) -> None:
    """Raise for more patterns than anyone writes by hand: each is matched with all names of a network."""
    length = sum(len(str(pattern)) for pattern in patterns)
    if len(patterns) > _PATTERNS or length > _CHARACTERS:
        raise ValueError(
            f"{argument} must hold at most {_PATTERNS} patterns of {_CHARACTERS} characters together, got "
            f"{len(patterns)} of {length}. One pattern can match many layers, such as 'layer4*'."
        )


def _size(
    default: tuple[int, int, int], in_channels: int | None, input_size: Sequence[int] | None
) -> tuple[int, int, int]:
    """Return the shape of one example, from the two arguments that describe it."""
    if in_channels is None:
        return default if input_size is None else image_size(input_size)
    channels = at_least_one("in_channels", in_channels)
    size = (channels, *default[1:]) if input_size is None else image_size(input_size)
    if size[0] != channels:
        raise ValueError(f"in_channels must be that of input_size {tuple(size)}, got {channels}.")
    return size


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """Return the values if there is one per channel, else their average for all channels."""
    return values if len(values) == channels else (sum(values) / len(values),)


def _check_name(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in (names := list(names)):
        raise ValueError(f"unknown {kind} {name!r}.{did_you_mean(name, names)}")


def _no_choice(library: str, pretrained: bool | str) -> None:
    if isinstance(pretrained, str):
        raise ValueError(f"pretrained must be True or False for {library}'s networks, got {pretrained!r}.")


def _torchvision(network: str, pretrained: bool | str) -> Source:
    from torchvision import models

    _no_choice("torchvision", pretrained)

    # These two also return auxiliary outputs, and transform their input in a way that depends on the weights.
    names = set(models.list_models(module=models)) - {"googlenet", "inception_v3"}
    _check_name("torchvision classifier", network, sorted(names))
    available: Any = models.get_model_weights(network)
    weights = available.DEFAULT
    preset = weights.transforms()

    def make(num_classes: int, size: tuple[int, int, int], arguments: dict[str, Any]) -> nn.Module:
        if size[0] != 3:
            raise ValueError(f"torchvision's networks take 3 channels, got {size[0]}; timm's take any number")
        if network.startswith("vit_") and size[1] != size[2]:
            raise ValueError(f"vision transformers of torchvision take square images, got {size[1]} x {size[2]}")
        fixed = {"vit_": {"image_size": size[1]}, "maxvit": {"input_size": size[1:]}}
        arguments = arguments | next((value for key, value in fixed.items() if network.startswith(key)), {})
        plain = partial(models.get_model, network, weights=None, num_classes=num_classes, **arguments)
        if not pretrained:
            return plain()
        net = models.get_model(network, weights=weights, **arguments)
        if num_classes != len(weights.meta["categories"]):
            (head,) = bl.last_layer(dict(net.named_modules()))
            net.set_submodule(head, plain().get_submodule(head))
        return net

    return Source(make, (3, preset.crop_size[0], preset.crop_size[0]), preset.mean, preset.std)


def _timm(network: str, pretrained: bool | str) -> Source:
    import timm

    _no_choice("timm", pretrained)

    _check_name("timm model", network, [*timm.list_models(), *timm.list_pretrained()])
    default = timm.get_pretrained_cfg(network)
    config = default.to_dict() if default else {}

    def make(num_classes: int, size: tuple[int, int, int], arguments: dict[str, Any]) -> nn.Module:
        if config.get("fixed_input_size") and size[1:] != tuple(config["input_size"][1:]):
            arguments = {"img_size": size[1:], **arguments}
        return timm.create_model(network, bool(pretrained), num_classes=num_classes, in_chans=size[0], **arguments)

    mean, std = config.get("mean") or IMAGENET_MEAN, config.get("std") or IMAGENET_STD
    return Source(make, tuple(config.get("input_size", (3, 224, 224))), mean, std)


def _smp(network: str, pretrained: bool | str) -> Source:
    import segmentation_models_pytorch as smp
    import timm

    architecture, _, encoder = network.partition("/")
    available: list[str] = []
    weights: Any = True
    architectures = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    _check_name("smp architecture", architecture, architectures)
    if encoder.startswith("tu-"):
        _check_name("timm encoder", encoder[3:], [*timm.list_models(), *timm.list_pretrained()])
    else:
        _check_name("smp encoder", encoder, smp.encoders.get_encoder_names())
        available = list(smp.encoders.encoders[encoder]["pretrained_settings"])
        weights = "imagenet" if "imagenet" in available else available[0]
    weights = pretrained if pretrained in available else weights
    file = pretrained if isinstance(pretrained, str) and pretrained != weights else None
    tensors = None if file is None else read_weights(file)

    def make(num_classes: int, size: tuple[int, int, int], arguments: dict[str, Any]) -> nn.Module:
        kind: Any = architectures[architecture]
        encoder_weights = weights if pretrained and file is None else None
        net = kind(encoder, encoder_weights=encoder_weights, in_channels=size[0], classes=num_classes, **arguments)
        if tensors is not None:
            fill_encoder(net.encoder, tensors, str(file))
        return net

    if not pretrained:
        return Source(make, any_size=True, num_classes=2)
    settings = smp.encoders.get_preprocessing_params(encoder, weights)
    if settings["input_space"] != "RGB":
        raise ValueError(
            f"pretrained must be False for encoder {encoder!r}: its weights are for {settings['input_space']}."
        )
    scale = settings["input_range"][1]  # the encoder's inputs go up to it, ours to 1
    mean, std = ([value / scale for value in settings[key]] for key in ("mean", "std"))
    return Source(make, mean=mean, std=std, any_size=True, num_classes=2)


LIBRARIES: dict[str, Callable[[str, bool | str], Source]] = {"torchvision": _torchvision, "timm": _timm, "smp": _smp}
