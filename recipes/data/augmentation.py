"""Random crops and flips of images, and of the labels of their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.checks import fraction, non_negative
from zoo.normalise import check_resize

_SHAPE, _ATTEMPTS = 4 / 3, 10  # of a crop of random area: its longest side over the other; windows that are tried
_DRAWS = 6  # of a scene's crop: factor, place, flip, brightness and contrast


@dataclass
class Augmentation:
    """How training images are varied.

    Attributes:
        resize: Side that images are resized to, before a crop of the model's input size is taken, >= that
            size; a random crop in training, the middle when measured. None for the input size itself.
        padding: Pixels around an image before its crop, >= 0.
        border: What these are: "zeros", or the image's own mirrored by "reflect".
        flip: Mirror every other image, at random.
        scale: Smallest and largest part of a picture's area, in (0, 1], that a crop shows, of a random place and a
            random shape from 3:4 to 4:3, as torchvision's RandomResizedCrop takes them; for pictures in files. None
            for crops of one size.
    """

    resize: int | None = None
    padding: int = 0
    border: Literal["zeros", "reflect"] = "zeros"
    flip: bool = False
    scale: list[float] | None = None

    def check(self, size: Sequence[int]) -> None:
        """Refuse an augmentation that breaks a rule, by name, for inputs of `size`, (c, h, w)."""
        if self.resize is not None:
            check_resize("augmentation.resize", self.resize, size)
        non_negative("augmentation.padding", self.padding)
        if self.border not in ("zeros", "reflect"):
            raise ValueError(f"augmentation.border must be 'zeros' or 'reflect', got {self.border!r}.")
        if self.scale is not None and (len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1):
            raise ValueError(f"augmentation.scale must be two parts of the area, in (0, 1], got {self.scale}.")
        if self.scale is not None and self.padding:
            raise ValueError(f"augmentation.padding must be 0 beside augmentation.scale, got {self.padding}.")
        if self.border == "reflect" and self.padding >= (side := self.resize or min(size[1:])):
            raise ValueError(f"augmentation.padding must be < {side}, the image that it reflects, got {self.padding}.")

    def __call__(
        self,
        x: Tensor,
        size: tuple[int, int],
        generator: torch.Generator,
        own: slice = slice(None),
        whole: int | None = None,
    ) -> Tensor:
        """Return a random crop of each image, mirrored or not.

        Args:
            x: Images `(n, c, h, w)`.
            size: Height and width of the crops.
            generator: Source of the choices.
            own: Which images of a batch these are; what is chosen for one depends on its place alone.
            whole: Images of the batch; None for those of `x`.
        """
        if not (self.padding or self.flip or size != x.shape[2:]):
            return x
        x = F.pad(x, (self.padding,) * 4, mode="constant" if self.border == "zeros" else "reflect")
        n, count, (height, width) = len(x), len(x) if whole is None else whole, size

        def windows(side: int, extent: int) -> Tensor:
            start = torch.randint(extent - side + 1, (count, 1), generator=generator)[own]
            return start + torch.arange(side)

        rows, columns = windows(height, x.shape[2]), windows(width, x.shape[3])
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator)[own] < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        crops = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
        return crops.permute(0, 3, 1, 2)

    def varied(self, image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return a random crop of one picture, mirrored or not.

        Args:
            image: Bytes `(c, h, w)`: the whole picture where there is a `scale`, else one resized.
            size: Height and width of the crop.
            generator: Source of the choices.

        Returns:
            Float in [0, 1], `(c, *size)`.
        """
        if self.scale is None:
            return self((image.float() / 255)[None], size, generator)[0]
        from torchvision.transforms.v2 import functional

        window = _window_of_area(image.shape[1:], self.scale, generator)
        image = functional.resized_crop(image, *window, size=list(size), antialias=True)
        if self.flip and float(torch.rand((), generator=generator)) < 0.5:
            image = functional.horizontal_flip(image)
        return functional.to_dtype(image, torch.float32, scale=True)


def _window_of_area(
    size: Sequence[int], scale: Sequence[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a window of a random part of an image's area, and of a random shape.

    Where ten of them do not fit, it is the largest in the middle of the least extreme shape, as in torchvision.
    """
    height, width = size
    for _ in range(_ATTEMPTS):
        area, shape, row, column = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp((2 * shape - 1) * math.log(_SHAPE))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return int(row * (height - rows + 1)), int(column * (width - columns + 1)), rows, columns
    rows, columns = min(height, round(width * _SHAPE)), min(width, round(height * _SHAPE))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


@dataclass
class SceneAugmentation:
    """How training images are varied together with a label for each pixel.

    Attributes:
        crop: Height and width of the crops, >= 1; None for the model's input size.
        scale: Smallest and largest factor of an image's size, whose logarithm is drawn uniformly, > 0. A crop that
            would exceed the image is taken at the smallest factor at which it fits.
        flip: Mirror every other image, at random.
        brightness: Largest relative change of the mean, in [0, 1).
        contrast: Largest relative change of the deviations from the mean, in [0, 1).
    """

    crop: list[int] | None = None
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0

    def check(self) -> None:
        """Refuse an augmentation that breaks a rule, by name."""
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise ValueError(f"augmentation.crop must be a height and a width >= 1, got {self.crop}.")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(
                f"augmentation.scale must be the smallest and the largest factor, both > 0, got {self.scale}."
            )
        fraction("augmentation.brightness", self.brightness)
        fraction("augmentation.contrast", self.contrast)

    def __call__(
        self, image: Tensor, labels: Tensor, size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return a random crop of an image and of its labels.

        Args:
            image: Bytes `(c, h, w)`.
            labels: Class per pixel `(h, w)`; they take the nearest pixel's where the image is interpolated.
            size: Height and width of the result.
            generator: Source of the choices, of which an image always takes as many.

        Returns:
            The image as float in [0, 1], `(c, *size)`, and its labels `(*size)`.
        """
        draws = torch.rand(_DRAWS, generator=generator).tolist()
        low, high = map(math.log, self.scale)
        fits = max(side / extent for side, extent in zip(size, labels.shape, strict=True))
        factor = max(math.exp(low + (high - low) * draws[0]), fits)
        rows, columns = (
            _window(round(side / factor), extent, place)
            for side, extent, place in zip(size, labels.shape, draws[1:3], strict=True)
        )
        x, y = image[:, rows, columns].float() / 255, labels[rows, columns]
        if x.shape[1:] != size:
            x = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
            y = F.interpolate(y[None, None].float(), size, mode="nearest-exact")[0, 0].to(labels.dtype)
        if self.flip and draws[3] < 0.5:
            x, y = x.flip(2), y.flip(1)
        mean, (brightness, contrast) = x.mean(), (2 * draw - 1 for draw in draws[4:])
        return _lit(x, mean, 1 + self.brightness * brightness, 1 + self.contrast * contrast), y

    def skip(self, generator: torch.Generator) -> None:
        """Move a generator on as the choices for an image would."""
        torch.rand(_DRAWS, generator=generator)


def _window(side: int, extent: int, place: float) -> slice:
    """Return a window of at most `extent` pixels at a place in [0, 1)."""
    side = min(max(side, 1), extent)
    start = int(place * (extent - side + 1))
    return slice(start, start + side)


def _lit(x: Tensor, mean: Tensor, brightness: float, contrast: float) -> Tensor:
    """Return an image whose mean and deviations from it have been multiplied, within [0, 1]."""
    if brightness == contrast == 1:
        return x
    return (contrast * (x - mean) + brightness * mean).clamp(0, 1)
