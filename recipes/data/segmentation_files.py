"""Pictures with a class for each pixel, in files that are decoded each time they are read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.data.augmentation import SceneAugmentation
from recipes.data.examples import held_out_index, limited_index, shuffled
from zoo.images import header, open_image

IGNORED = 255  # the label of pixels without a class, in every set


class Pair(NamedTuple):
    """An image, and the mask that holds the label of each of its pixels."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Labels:
    """What the values of a mask are.

    Attributes:
        classes: Names of the classes, in the order of their numbers.
        numbers: Class of each value, `IGNORED` for one that stands for none.
    """

    classes: Sequence[str]
    numbers: dict[int, int]

    def numbered(self, values: Tensor, path: Path) -> Tensor:
        """Return the class of each pixel, bytes, from the values of a mask.

        Raises:
            ValueError: If a value is unknown.
        """
        found = values.unique().tolist()
        if unknown := [value for value in found if value not in self.numbers]:
            count = int((values == unknown[0]).sum())
            raise ValueError(
                f"mask must hold the labels {_ranges(self.numbers)}, got {unknown[0]} at {count} pixels of {path}."
            )
        table = torch.full((256,), IGNORED, dtype=torch.uint8)
        for value, number in self.numbers.items():
            table[value] = number
        return table[values.int()]


@dataclass(frozen=True)
class MaskFiles:
    """The labels of all pixels, read when they are asked for."""

    pairs: Sequence[Pair]
    labels: Labels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return classes, or `IGNORED`, of images of one size, `(n, h, w)`."""
        return _stacked([read_mask(pair, self.labels) for pair in _chosen(self.pairs, index)]).long()

    def digest(self) -> str:
        """Return a word that tells these files from others: by their names and sizes in bytes."""
        names = [f"{pair.mask.name} {pair.mask.stat().st_size}" for pair in self.pairs]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scenes:
    """A split of pictures with masks.

    Attributes:
        pairs: The files.
        labels: What the masks hold.
        skipped: Files that were left out, each with the reason.
    """

    pairs: Sequence[Pair]
    labels: Labels
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def targets(self) -> MaskFiles:
        """The labels of all pixels."""
        return MaskFiles(self.pairs, self.labels)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.labels.classes)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return images as `ToTensor` gives them, float in [0, 1], `(n, 3, h, w)`; they must be of one size."""
        return _stacked([read_picture(pair.image) for pair in _chosen(self.pairs, index)]).float() / 255

    def taken(self, index: Tensor) -> Scenes:
        """Return the examples of these numbers."""
        return dataclasses.replace(self, pairs=[self.pairs[number] for number in index.tolist()])

    def of_one_size(self, index: Tensor) -> Scenes:
        """Return those of the examples of these numbers whose size is that of the first of them."""
        chosen = self.taken(index)
        return dataclasses.replace(chosen, pairs=[p for p in chosen.pairs if _size(p) == _size(chosen.pairs[0])])

    def limited(self, limit: int | None) -> Scenes:
        """Return `limit` examples from all over the split, always the same; all if None."""
        if limit is None or limit >= len(self):
            return self
        return self.taken(limited_index(len(self), limit))

    def held_out(self, count: int) -> tuple[Scenes, Scenes]:
        """Return the split without `count` examples, chosen at random but always the same, and these.

        Raises:
            ValueError: If none would be left.
        """
        rest, out = held_out_index(len(self), count)
        return self.taken(rest), dataclasses.replace(self.taken(out), skipped=())

    def class_weights(self, balance: float) -> list[float] | None:
        """Return weights of the classes, shares of all labelled pixels to the power of `-balance`, 1 on average.

        A class without a pixel has the weight of the rarest other; None if `balance` is 0.
        """
        if balance == 0:
            return None
        counts = torch.zeros(256, dtype=torch.float64)
        for pair in self.pairs:
            counts += read_mask(pair, self.labels).flatten().int().bincount(minlength=256)
        counts = counts[: len(self.labels.classes)]
        if not counts.any():
            raise ValueError("class_balance must be 0 for masks without a labelled pixel.")
        weights = counts.where(counts > 0, counts[counts > 0].min()).pow(-balance)
        return (weights / weights.mean()).tolist()

    def checked(self, skip: bool = False) -> Scenes:
        """Return the split after reading every file whose header does not tell that it is sound.

        Args:
            skip: Decode all files, and leave out those with a fault instead of raising.

        Raises:
            ValueError: If a picture and its mask differ in size, or a header cannot be read; with `skip`, if no
                example is left.
        """
        if not skip:
            for pair in self.pairs:
                check_sizes(pair)
            return self
        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(lambda pair: _fault(pair, self.labels), self.pairs))
        sound = [pair for pair, fault in zip(self.pairs, faults, strict=True) if fault is None]
        if not sound:
            raise ValueError(f"data must hold a picture that can be read, got {len(faults)} with faults: {faults[0]}")
        return dataclasses.replace(self, pairs=sound, skipped=[fault for fault in faults if fault is not None])


def batches(
    scenes: Scenes,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int,
    augmentation: SceneAugmentation,
    size: tuple[int, int],
    own: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's full batches of crops, or the part `own` of each, in random order, see `shuffled`.

    Args:
        scenes: Training examples.
        batch_size: Crops per batch, of an image each.
        seed: Of order and crops.
        epoch: Number of the epoch.
        start: Number of the first batch.
        augmentation: How images are varied.
        size: Height and width of the crops.
        own: Which crops of a batch are read; how each is varied depends on its place alone.
    """
    for index, generator in shuffled(len(scenes), batch_size, seed, epoch, start):
        pairs = _chosen(scenes.pairs, index[own])
        for _ in range(own.start or 0):
            augmentation.skip(generator)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            read = list(pool.map(lambda pair: (read_picture(pair.image), read_mask(pair, scenes.labels)), pairs))
        crops = [augmentation(image, labels, size, generator) for image, labels in read]
        if not crops:  # fewer examples than ranks
            yield torch.empty(0, 3, *size), torch.empty(0, *size, dtype=torch.long)
            continue
        x, y = torch.stack([image for image, _ in crops]), torch.stack([labels for _, labels in crops])
        yield x.contiguous(memory_format=torch.channels_last), y.long()


def read_picture(path: Path) -> Tensor:
    """Return a picture as bytes `(3, h, w)`, upright.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has more than 8 bits a channel.
    """
    picture = open_image(path)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"image must be of 8 bits a channel, got {path} of Pillow's mode {picture.mode}.")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def read_mask(pair: Pair, labels: Labels) -> Tensor:
    """Return the class of each pixel, bytes `(h, w)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, holds colours or an unknown label, or is of another size than its picture.
    """
    check_sizes(pair)
    mask = open_image(pair.mask)
    if mask.mode not in ("L", "P", "I", "I;16"):
        raise ValueError(
            f"mask must hold one label a pixel, in grey or with a palette, got {pair.mask} of mode {mask.mode}."
        )
    values = np.array(mask)
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"mask must hold labels from 0 to 255, got {values.min()} to {values.max()} in {pair.mask}.")
    return labels.numbered(torch.from_numpy(values.astype(np.uint8)), pair.mask)


def _size(pair: Pair) -> tuple[int, int]:
    with header(pair.image) as image:
        return image.size


def check_sizes(pair: Pair) -> None:
    """Raise ValueError unless a picture and its mask are of one size, as their headers say."""
    with header(pair.image) as image, header(pair.mask) as mask:
        sizes = image.size, mask.size
    if sizes[0] != sizes[1]:
        (width, height), (mask_width, mask_height) = sizes
        raise ValueError(
            f"mask must have the size of its picture, got {mask_width} x {mask_height} in {pair.mask} for "
            f"{width} x {height} in {pair.image}."
        )


def _fault(pair: Pair, labels: Labels) -> str | None:
    """Return what is wrong with a pair of files, None if nothing."""
    try:
        read_picture(pair.image)
        read_mask(pair, labels)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _chosen(pairs: Sequence[Pair], index: Tensor | slice) -> list[Pair]:
    return [pairs[number] for number in torch.arange(len(pairs))[index].tolist()]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return the images of a batch as one tensor.

    Raises:
        ValueError: If they differ in size.
    """
    if len(sizes := {tuple(part.shape[-2:]) for part in parts}) > 1:
        shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise ValueError(f"images of a batch must be of one size, got {shown}. Measure them with a batch size of 1.")
    return torch.stack([*parts])


def _ranges(numbers: dict[int, int]) -> str:
    """Return values in words, runs of them as a range.

    >>> _ranges(dict.fromkeys([0, 1, 2, 255]))
    '0 to 2, 255'
    """
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)
