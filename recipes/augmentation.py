"""Random crops and flips of a batch of images, and the crop of the middle that measurements use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.checks import at_least_one, non_negative


@dataclass
class Augmentation:
    """How training images are varied.

    Attributes:
        resize: Side that images are resized to, before a crop of the model's input size is taken, >= that
            size; a random crop in training, the middle when measured. None for the input size itself.
        padding: Zeros around an image before its crop, in pixels, >= 0.
        flip: Mirror every other image, at random.
    """

    resize: int | None = None
    padding: int = 0
    flip: bool = False

    def check(self, size: Sequence[int]) -> None:
        """Refuse an augmentation that breaks a rule, by name, for inputs of `size`, (c, h, w)."""
        if self.resize is not None:
            at_least_one("augmentation.resize", self.resize)
            if self.resize < max(size[1:]):
                raise ValueError(
                    f"augmentation.resize must be >= the model's input, {tuple(size[1:])}, got {self.resize}."
                )
        non_negative("augmentation.padding", self.padding)

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return a random crop of each image, mirrored or not.

        Args:
            x: Images `(n, c, h, w)`.
            size: Height and width of the crops.
            generator: Source of the choices.
        """
        if not (self.padding or self.flip or size != x.shape[2:]):
            return x
        x = F.pad(x, (self.padding,) * 4)
        n, (height, width) = len(x), size

        def windows(side: int, extent: int) -> Tensor:
            start = torch.randint(extent - side + 1, (n, 1), generator=generator)
            return start + torch.arange(side)

        rows, columns = windows(height, x.shape[2]), windows(width, x.shape[3])
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        crops = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
        return crops.permute(0, 3, 1, 2)


def middle(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle `size` of images `(n, c, h, w)`."""
    top, left = ((extent - side) // 2 for extent, side in zip(x.shape[2:], size, strict=True))
    return x[:, :, top : top + size[0], left : left + size[1]]
