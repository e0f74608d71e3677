"""The first module of every network of the zoo: it checks its input and normalises it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """`(x - mean) / std` per channel, for inputs of one size as `ToTensor` gives them, in [0, 1].

    Args:
        size: Shape of one example, `(c, h, w)` or `(features,)`.
        mean: Mean per channel, or one for all.
        std: Standard deviation per channel, or one for all, > 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: Sequence[int], mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)):
        super().__init__()
        self.size = tuple(size)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.size[0]):
                raise ValueError(f"{name} must have 1 or {self.size[0]} values, one per channel, got {len(values)}.")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).reshape(-1, *[1] * (len(size) - 1)))
        if not (self.std > 0).all():
            raise ValueError(f"std must be > 0, got {list(std)}.")

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point in [0, 1], got {x.dtype}. zoo.transforms(model) converts images, "
                "x / 255 bytes."
            )
        if tuple(x.shape[1:]) != self.size:
            expected = ", ".join(str(n) for n in self.size)
            raise ValueError(
                f"x must have the shape (n, {expected}), got {tuple(x.shape)}. zoo.transforms(model) resizes images."
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"size={self.size}"
