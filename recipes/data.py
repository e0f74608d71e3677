"""Data sets as tensors, and batches of them in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayeslayers.checks import near

NAMES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


@dataclass(frozen=True)
class Split:
    """One split of a data set of images.

    Attributes:
        images: Bytes `(n, c, h, w)`.
        labels: Class indices `(n,)`.
        classes: Names of the classes.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return images as `ToTensor` gives them, float in [0, 1]."""
        return self.images[index].float() / 255

    def head(self, limit: int | None) -> Split:
        """Return the first `limit` examples, all if None."""
        return self if limit is None else Split(self.images[:limit], self.labels[:limit], self.classes)


def load_split(name: str, root: str | Path | None, *, train: bool) -> Split:
    """Return a split of a torchvision data set.

    Args:
        name: A key of `NAMES`.
        root: Folder of data already there, as torchvision lays it out. None: the folder `data`,
            where the set is downloaded to if need be.
        train: The training split, else the test split.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If `root` has no such data.
        ValueError: If the data is damaged.
    """
    from torchvision import datasets

    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}.{near(name, NAMES)} Known: {', '.join(NAMES)}.")
    try:
        data = getattr(datasets, NAMES[name])(root or "data", train=train, download=root is None)
    except RuntimeError as error:
        if root is None:
            raise ConnectionError(f"{NAMES[name]} could not be downloaded: {error}. Give --data-root.") from None
        raise FileNotFoundError(
            f"data root must hold {NAMES[name]} as torchvision lays it out, got {root} without it. Leave --data-root "
            "out to download it."
        ) from None
    except (ValueError, AssertionError, LookupError):  # what torchvision raises for damaged files
        raise ValueError(
            f"{NAMES[name]} must be as torchvision lays it out, got a damaged file in {root or 'data'}. "
            "Download it anew."
        ) from None
    if len(data.data) != len(data.targets):
        raise ValueError(f"{NAMES[name]} must have a label per image, got {len(data.targets)} for {len(data.data)}.")
    return Split(data.data[:, None], data.targets, [str(name) for name in data.classes])


def batches(split: Split, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's full batches in random order, from number `start` on.

    The order depends on seed and epoch alone, so a resumed run sees what an uninterrupted one does.
    A last batch that is not full is left out, unless it is the only one.
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    for number in range(start, num_batches(split, batch_size)):
        index = order[number * batch_size : (number + 1) * batch_size]
        yield split.inputs(index), split.labels[index]


def num_batches(split: Split, batch_size: int) -> int:
    """Return how many batches `batches` yields from the start of an epoch."""
    return max(1, len(split) // batch_size)
