"""Random crops and flips of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.checks import non_negative
from zoo.normalise import check_resize


@dataclass
class Augmentation:
    """How training images are varied.

    Attributes:
        resize: Side that images are resized to, before a crop of the model's input size is taken, >= that
            size; a random crop in training, the middle when measured. None for the input size itself.
        padding: Pixels around an image before its crop, >= 0.
        border: What these are: "zeros", or the image's own mirrored by "reflect".
        flip: Mirror every other image, at random.
    """

    resize: int | None = None
    padding: int = 0
    border: Literal["zeros", "reflect"] = "zeros"
    flip: bool = False

    def check(self, size: Sequence[int]) -> None:
        """Refuse an augmentation that breaks a rule, by name, for inputs of `size`, (c, h, w)."""
        if self.resize is not None:
            check_resize("augmentation.resize", self.resize, size)
        non_negative("augmentation.padding", self.padding)
        if self.border not in ("zeros", "reflect"):
            raise ValueError(f"augmentation.border must be 'zeros' or 'reflect', got {self.border!r}.")
        if self.border == "reflect" and self.padding >= (side := self.resize or min(size[1:])):
            raise ValueError(f"augmentation.padding must be < {side}, the image that it reflects, got {self.padding}.")

    def __call__(self, x: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return a random crop of each image, mirrored or not.

        Args:
            x: Images `(n, c, h, w)`.
            size: Height and width of the crops.
            generator: Source of the choices.
        """
        if not (self.padding or self.flip or size != x.shape[2:]):
            return x
        x = F.pad(x, (self.padding,) * 4, mode="constant" if self.border == "zeros" else "reflect")
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
