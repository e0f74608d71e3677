"""Blobs in the plane, folded into two classes, and out-of-distribution points around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from recipes.data.slices import Points, save_slice

CLASSES = ["even blobs", "odd blobs"]
OOD_NAME = "ring"
_RADIUS = 2.0  # of the OOD ring, in half widths of the data


@dataclass
class Blobs:
    """Gaussian blobs of unit variance; those of an odd number are one class, those of an even one the other.

    Attributes:
        examples: Training examples.
        test_examples: Test examples, of the same blobs.
        centres: Number of blobs, >= 2.
        seed: Of the centres and the examples.
    """

    examples: int = 100
    test_examples: int = 500
    centres: int = 5
    seed: int = 7

    @property
    def name(self) -> str:
        """Name of the data set: "blobs" for the bundled test examples, and what is changed for others."""
        changed = [
            f"{key}{getattr(self, key)}" for key in ("centres", "seed") if getattr(self, key) != getattr(Blobs, key)
        ]
        return "-".join(["blobs", *changed])

    def split(self, train: bool) -> Points:
        """Return the training examples or the test examples, with labels `(n, 1)`."""
        stream = np.random.RandomState(self.seed)
        centres = stream.uniform(-10, 10, (self.centres, 2))
        x, y = make_blobs(stream, centres, self.examples)
        if not train:
            x, y = make_blobs(np.random.RandomState(self.seed + 1), centres, self.test_examples)
        return Points(torch.tensor(x, dtype=torch.float32), torch.tensor(y)[:, None] % 2)

    def ood(self) -> Points:
        """Return points where no examples are: an ellipse around them."""
        x = self.split(train=True).x
        low, high = x.amin(0), x.amax(0)
        angle = 2 * math.pi * torch.arange(200) / 200
        ring = torch.stack([angle.cos(), angle.sin()], 1)
        return Points((low + high) / 2 + _RADIUS * (high - low) / 2 * ring, torch.zeros(len(ring), 1, dtype=torch.long))


def make_blobs(stream: np.random.RandomState, centres: np.ndarray, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shuffled points `(n, 2)` of unit variance around centres, and the number of each point's centre.

    The numbers are those of `sklearn.datasets.make_blobs` from the same stream, of which the bundled slice and
    posterior were made.
    """
    sizes = [examples // len(centres) + (k < examples % len(centres)) for k in range(len(centres))]
    x = np.concatenate([stream.normal(centre, 1.0, (n, 2)) for centre, n in zip(centres, sizes, strict=True)])
    order = np.arange(examples)
    stream.shuffle(order)
    return x[order], np.repeat(np.arange(len(centres)), sizes)[order]


def write_slices() -> None:
    """Write the test examples and the ring around them where `bayeslayers verify` finds them."""
    blobs = Blobs()
    save_slice(blobs.name, blobs.split(train=False))
    save_slice(OOD_NAME, blobs.ood())
