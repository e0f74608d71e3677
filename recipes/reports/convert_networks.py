"""Networks of other libraries by name, untrained and small, each with inputs and a loss: what `convert` is tried on.

A name is `LIBRARY:NETWORK`. Nothing is downloaded: weights are random, and sizes are the smallest that a network takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.reports.convert_names import NETWORKS

EXAMPLES, CLASSES, TOKENS, WORDS = 2, 5, 8, 30


@dataclass(frozen=True)
class Trial:
    """A network with what a step of training needs.

    Attributes:
        network: The ordinary network.
        args: Positional inputs, with the examples in dimension 0.
        kwargs: Those by name.
        loss: The mean loss over examples of what the network returns.
        output: Which part of it is a tensor, as for `predict`; None where it is one.
        predicts: Whether the outputs in eval mode are those of a likelihood.
        elements: Elements that an example's loss is a mean over, where that is not one mean.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor]
    output: Any = None
    predicts: bool = True
    elements: float | None = None


def trial(name: str) -> Trial:
    """Build a network of `NETWORKS`.

    Raises:
        KeyError: If there is none of that name.
        ImportError: If its library is not installed.
    """
    torch.manual_seed(0)
    library, _, own = name.partition(":")
    return _MAKERS[library](own, NETWORKS[name])


def _cross_entropy(output: Tensor) -> Tensor:
    """Return the cross entropy at labels that follow from the place, of classes in dimension 1."""
    labels = torch.arange(output.numel() // output.shape[1]) % output.shape[1]
    return F.cross_entropy(output, labels.view(len(output), *output.shape[2:]))


def _image(size: list[int]) -> Tensor:
    return torch.rand(EXAMPLES, *size)


def _of_images(network: nn.Module, size: list[int], output: Any = None) -> Trial:
    def loss(returned: Any) -> Tensor:
        if isinstance(returned, tuple):  # with auxiliary heads in training
            return torch.stack([_cross_entropy(part) for part in returned]).sum()
        if isinstance(returned, Mapping):
            return torch.stack([_cross_entropy(part) for part in returned.values()]).sum()
        return _cross_entropy(returned)

    return Trial(network, (_image(size),), {}, loss, output)


def _torchvision(name: str, options: Mapping[str, Any]) -> Trial:
    from torchvision import models

    options = dict(options)
    size = [3, *options.pop("size")]
    kind = options.pop("kind", "classification")
    if kind == "flow":
        network = models.get_model(name, weights=None)

        def distance(flows: list[Tensor]) -> Tensor:
            return torch.stack([flow.square().mean() for flow in flows]).mean()

        return Trial(network, (_image(size), _image(size)), {}, distance, -1, elements=1.0)
    if kind == "detection":
        network = models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **options)
        boxes = torch.tensor([[[4.0, 4.0, 40.0, 44.0]], [[10.0, 6.0, 50.0, 30.0]]])
        return Trial(_Detector(network), (_image(size), boxes), {}, lambda losses: losses, predicts=False, elements=1.0)
    if kind == "segmentation":
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    network = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return _of_images(network, size, "out" if kind == "segmentation" else None)


class _Detector(nn.Module):
    """A detector of torchvision as a network of tensors: its loss in training, its boxes otherwise."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, boxes: Tensor) -> Any:
        if not self.training:
            return self.network(list(images))
        targets = [
            {
                "boxes": own,
                "labels": torch.ones(len(own), dtype=torch.long),
                "masks": torch.ones(len(own), *image.shape[1:]),
            }
            for own, image in zip(boxes, images, strict=True)
        ]
        return torch.stack(list(self.network(list(images), targets).values())).sum()


def _timm(name: str, options: Mapping[str, Any]) -> Trial:
    import timm

    size = [3, *options["size"]]
    try:
        network = timm.create_model(name, num_classes=CLASSES, img_size=size[1])
    except TypeError:  # takes images of any size
        network = timm.create_model(name, num_classes=CLASSES)
    return _of_images(network, size)


def _smp(name: str, options: Mapping[str, Any]) -> Trial:
    import segmentation_models_pytorch as smp

    options = dict(options)
    size = [3, *options.pop("size")]
    architecture, _, encoder = name.partition("/")
    return _of_images(smp.create_model(architecture, encoder, None, classes=CLASSES, **options), size)


def _torch(name: str, options: Mapping[str, Any]) -> Trial:
    network = _Recurrent(name) if name in ("LSTM", "GRU", "RNN") else _Encoder()
    ids = torch.randint(1, WORDS, (EXAMPLES, TOKENS))
    return Trial(network, (ids,), {}, _cross_entropy)


class _Recurrent(nn.Module):
    """A classifier of tokens by a recurrent network of torch."""

    def __init__(self, kind: str):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.recurrent = getattr(nn, kind)(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(ids))[0].mean(1))


class _Encoder(nn.Module):
    """A classifier of tokens by torch's `TransformerEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids)).mean(1))


def _transformers(name: str, options: Mapping[str, Any]) -> Trial:
    try:
        import transformers
    except ImportError:
        raise ImportError("networks of transformers need it, got no such package. pip install transformers.") from None

    options = dict(options)
    config = getattr(transformers, options.pop("config"))
    takes = options.pop("takes", "tokens")
    inside = options.pop("inside", "")
    network = getattr(transformers, name)(config(**options)).get_submodule(inside)
    inputs = {
        "tokens": lambda: {"input_ids": torch.randint(5, WORDS, (EXAMPLES, TOKENS))},
        "both": lambda: {
            "input_ids": torch.randint(5, WORDS, (EXAMPLES, TOKENS)),
            "decoder_input_ids": torch.randint(5, WORDS, (EXAMPLES, TOKENS)),
        },
        "pixels": lambda: {"pixel_values": _image([3, 32, 32])},
        "sound": lambda: {"input_features": torch.randn(EXAMPLES, 80, 32)},
    }[takes]()

    def outputs(returned: Any) -> Tensor:
        return returned["logits"] if "logits" in returned else returned["last_hidden_state"]

    def loss(returned: Any) -> Tensor:
        output = outputs(returned)
        return _cross_entropy(output if output.dim() == 2 else output.transpose(1, 2))

    return Trial(network, (), inputs, loss, outputs)


_MAKERS: dict[str, Callable[[str, Mapping[str, Any]], Trial]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "timm": _timm,
    "smp": _smp,
    "transformers": _transformers,
}
