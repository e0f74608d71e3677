"""Conversion of any image to the input of a network of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.images import open_image, reduced
from zoo.normalise import check_resize
from zoo.registry import card_of

_CHANNELS = (1, 3, 4)  # grey, RGB, RGB with opacity
_AMPLE_PIXELS = 2**22  # images up to this size are not averaged
_GAP = 4  # sides of an averaged image over those that it is resized to; beyond 3 the result looks the same
_STRIP = 2**20  # pixels that are converted to floats at once


def transforms(model: nn.Module) -> Callable[[Any], Tensor]:
    """Return a function from an image to the input of `model`: float in [0, 1], `(c, h, w)` at its size.

    It accepts a PIL image of any mode, and a NumPy array or tensor `(h, w)`, `(h, w, c)` or `(c, h, w)`
    of bytes, 16-bit integers, booleans or floats in [0, 1], grey or RGB. Transparent pixels become
    white. The model itself normalises. PIL's mode "I" does not define white: integers up to 255 are
    taken for bytes, larger ones for 16 bits. Floats, as in mode "F", must be in [0, 1].

    An image's EXIF orientation is applied. A PIL image of more than 2^26 pixels raises before it is decoded, and
    large images shrink before they become floats.

    An image of other proportions is cropped to its centre, not squashed. If the card names a larger size to
    resize to, the input is the central crop of the resized image.

    Args:
        model: A model that `zoo.create` or `zoo.load` returned, for images.
    """
    from torchvision.transforms import v2

    card = card_of(model)
    size = card.input_size
    if len(size) != 3 or size[0] not in (1, 3):
        raise ValueError(f"model must take grey or RGB images, got one for inputs of shape {tuple(size)}.")
    colours = v2.Grayscale() if size[0] == 1 else v2.RGB()
    if card.resize is not None:
        check_resize("resize", card.resize, size)
    sides = size[1:] if card.resize is None else [card.resize] * 2
    return lambda image: middle(fitted(colours(_floats(_pixels(image, sides), sides)), sides), size[1:])


def fitted(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the centre of images `(*, h, w)` in [0, 1], cropped to the proportions of `size` and resized to it."""
    from torchvision.transforms.v2.functional import resize

    # Resizing averages with weights that sum to 1 only up to rounding.
    return resize(_of_proportions(x, size), list(size), antialias=True).clamp(0, 1)


def _of_proportions(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the centre of images `(*, h, w)`, cropped to the proportions of `size`."""
    scale = min(extent / side for extent, side in zip(x.shape[-2:], size, strict=True))
    return middle(x, [max(1, round(side * scale)) for side in size])


def middle(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the central crop of `size`, (h, w), of images `(*, h, w)`."""
    top, left = ((extent - side) // 2 for extent, side in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def _pixels(image: Any, size: Sequence[int]) -> Tensor:
    """Return an image's unconverted values, `(c, h, w)`, in a resolution that suffices for resizing to `size`."""
    from PIL import Image

    if isinstance(image, Image.Image):
        array = _pil_array(open_image(image), size)
    elif isinstance(image, np.ndarray | Tensor):
        array = image
    else:
        raise TypeError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}.")
    shape = tuple(array.shape)
    if len(shape) == 2 and min(shape) > 0:
        return _tensor(array)[None]
    # If both ends could be channels, they are last in an array, as images are stored, and first in a tensor.
    first_dims = (0, 2) if isinstance(array, Tensor) else (2, 0)
    for dim in first_dims if len(shape) == 3 and min(shape) > 0 else ():
        if shape[dim] in _CHANNELS:
            return _tensor(array) if dim == 0 else _tensor(array).permute(2, 0, 1)
    raise ValueError(f"image must have the shape (h, w), (h, w, c) or (c, h, w) with 1, 3 or 4 channels, got {shape}.")


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))


def _pil_array(image: Any, size: Sequence[int]) -> np.ndarray:
    """Return the values of an upright PIL image: bytes, 16-bit integers or floats."""
    if image.mode.startswith("I;16"):  # in any byte order
        return np.array(image).astype(np.uint16)
    if image.mode == "I":
        return _of_its_range(np.array(image))
    if image.mode == "F":
        return np.array(image)
    if image.has_transparency_data:
        return np.array(image.convert("RGBA"))
    return np.array(reduced(image.convert("L" if image.mode in ("1", "L") else "RGB"), size))


def _of_its_range(array: np.ndarray) -> np.ndarray:
    """Return the integers of PIL's mode "I", which does not define white: bytes if up to 255, else 16 bits."""
    low, high = array.min(), array.max()
    if not (0 <= low and high < 2**16):
        raise ValueError(f"image must hold values from 0 to 65535, got {low} to {high}.")
    return array.astype(np.uint8 if high < 2**8 else np.uint16)


def _floats(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return an image `(c, h, w)` as floats in [0, 1] without transparency.

    A large image is cropped to the proportions of `size` and averaged over squares of pixels, one strip at a time,
    so that its floats are never all in memory.
    """
    side = min(extent // (_GAP * target) for extent, target in zip(x.shape[1:], size, strict=True))
    if side < 2 or x.shape[1:].numel() <= _AMPLE_PIXELS:
        return _opaque(_unit_floats(x))
    x = _of_proportions(x, size)
    rows = side * max(1, _STRIP // (side * x.shape[2]))
    strips = (F.avg_pool2d(_opaque(_unit_floats(strip)), side) for strip in x.split(rows, 1) if strip.shape[1] >= side)
    return torch.cat([*strips], 1)


def _unit_floats(x: Tensor) -> Tensor:
    """Return values in [0, 1]: integers are divided by their largest value, 255 except for uint16."""
    if x.is_complex():
        raise TypeError(f"image must hold real values, got {x.dtype}.")
    kind = 1.0 if x.is_floating_point() or x.dtype == torch.bool else 65535.0 if x.dtype == torch.uint16 else 255.0
    x = x.to(torch.int64) if x.dtype in (torch.uint32, torch.uint64) else x.int() if x.dtype == torch.uint16 else x
    low, high = map(float, (x.byte() if x.dtype == torch.bool else x).aminmax())
    if not (low >= 0 and high <= kind):  # NaN too
        raise ValueError(f"image must hold values from 0 to {kind:.0f}, got {low:.4g} to {high:.4g}.")
    return x.float() / kind


def _opaque(x: Tensor) -> Tensor:
    """Return the image blended with white, if it has opacity as a fourth channel."""
    return x[:3] * x[3:] + 1 - x[3:] if len(x) == 4 else x
