"""From any image to the input of a network of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import card_of


def transforms(model: nn.Module) -> Callable[[Any], Tensor]:
    """Return a function from an image to the input of `model`: float in [0, 1], `(c, h, w)` at its size.

    It takes a PIL image, a NumPy array or tensor `(h, w)`, `(h, w, c)` or `(c, h, w)`, bytes or
    float, grey or RGB. Normalisation is the model's own.

    Args:
        model: A model that `zoo.create` or `zoo.load` returned, for images.
    """
    from torchvision.transforms import v2

    size = card_of(model).input_size
    if len(size) != 3:
        raise ValueError(f"model must take images, got one for inputs of shape {tuple(size)}.")
    convert = v2.Compose(
        [
            v2.ToImage(),
            v2.Grayscale() if size[0] == 1 else v2.RGB(),
            v2.Resize(size[1:], antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )
    return lambda image: convert(image).clamp(0, 1)
