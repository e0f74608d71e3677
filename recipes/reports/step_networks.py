"""Networks whose steps `benchmark step` measures, with a batch each; they are Bayesian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from recipes.data import clauses
from recipes.reports.text_tasks import TEXT_TASKS

BATCH = 128
Batch = tuple[nn.Module, Tensor, Tensor]


def step_network(name: str) -> Batch:
    """Return a network of `NETWORKS` or of the zoo, with random inputs and labels.

    Args:
        name: Its name; one of the zoo alone must be a classifier, and gets a batch of 128.

    Raises:
        ValueError: If there is none, or it is no classifier.
    """
    if name in NETWORKS:
        return NETWORKS[name]()
    model = zoo.create(name)
    x = torch.rand(BATCH, *zoo.card_of(model).input_size)
    shape = _output_shape(model, x[:1])
    if len(shape) != 2:
        raise ValueError(f"models must be classifiers, got {name}, whose output for one example is {tuple(shape)}.")
    return model, x, torch.randint(shape[1], (BATCH,))


@torch.no_grad()
def _output_shape(model: nn.Module, x: Tensor) -> torch.Size:
    return bl.to_deterministic(model).eval()(x).shape


def _images(name: str, count: int, size: int = 32) -> Batch:
    return zoo.create(name), torch.rand(count, 3, size, size), torch.randint(10, (count,))


def _sentences(name: str) -> Batch:
    points = clauses.sentences(BATCH, 0)
    return bl.to_bayesian(TEXT_TASKS[name].build())[0], points.x, points.labels


def _swin() -> Batch:
    from torchvision.models import SwinTransformer

    options: dict[str, Any] = {"stochastic_depth_prob": 0.0, "num_classes": 10}
    net = SwinTransformer([2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], **options)
    return bl.to_bayesian(net)[0], torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))


def _unet_small() -> Batch:
    model, x = zoo.create("unet_small", num_classes=10), torch.rand(8, 3, 96, 128)
    return model, x, torch.randint(10, (8, 96, 128))


class _Encoder(nn.Module):
    """Four pre-norm layers, 256 wide, and a linear head on the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def _encoder() -> Batch:
    return bl.to_bayesian(_Encoder())[0], torch.randn(32, 64, 256), torch.randint(10, (32,))


def _layers200() -> Batch:
    """Return 200 linear layers of 16 x 16 with tanh: the cost of a tensor, whatever its size."""
    layers = [part for _ in range(200) for part in (nn.Linear(16, 16), nn.Tanh())]
    return bl.to_bayesian(nn.Sequential(*layers))[0], torch.randn(64, 16), torch.randint(16, (64,))


NETWORKS: dict[str, Callable[[], Batch]] = {
    **{name: partial(_sentences, name) for name in TEXT_TASKS},
    "swin": _swin,
    "resnet20": partial(_images, "resnet20", 64),
    "resnet18_cifar": partial(_images, "resnet18_cifar", 32),
    "encoder": _encoder,
    "unet_small": _unet_small,
    "layers200": _layers200,
}
