"""Training batches of pictures in files: decoded and varied ahead of the steps, by threads or by worker processes.

How a picture is varied depends on seed, epoch, batch and place alone. So runs of any number of processes and workers
see the same pictures, and a resumed run sees what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.data.augmentation import Augmentation
from recipes.data.examples import shuffled
from recipes.data.image_files import ImageFiles

Example: TypeAlias = tuple[Tensor, int] | str  # an image with its class, or what is wrong with its file


class Key(NamedTuple):
    """A picture of a batch: its number in the split, and the seed of how it is varied."""

    number: int
    seed: int


class Batch(NamedTuple):
    """What is read of a batch.

    Attributes:
        x: Images as `ToTensor` gives them, `(n, c, h, w)`, float in [0, 1].
        y: Class indices `(n,)`.
        faults: What is wrong with the pictures that were left out.
    """

    x: Tensor
    y: Tensor
    faults: list[str]


@dataclass(frozen=True)
class VariedPictures(Dataset[Example]):
    """Pictures by key, each varied as its seed says.

    Attributes:
        files: The pictures.
        labels: Class indices `(n,)`.
        augmentation: How they are varied.
        crop: Height and width of what comes of them.
        skip: Return what is wrong with a picture that cannot be read, instead of raising.
    """

    files: ImageFiles
    labels: Tensor
    augmentation: Augmentation
    crop: tuple[int, int]
    skip: bool

    def __getitem__(self, key: Key) -> Example:
        try:
            image = self.files.read(key.number, whole=self.augmentation.scale is not None)
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            return str(error)
        varied = self.augmentation.varied(image, self.crop, torch.Generator().manual_seed(key.seed))
        return varied, int(self.labels[key.number])


def file_batches(
    pictures: VariedPictures,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int,
    own: slice = slice(None),
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Yield the part `own` of an epoch's full batches, shuffled, from number `start` on, see `shuffled`.

    Args:
        pictures: The training split.
        batch_size: Examples per batch, of which pictures that cannot be read are missing.
        seed: Of order and choices.
        epoch: Number of the epoch.
        start: Number of the first batch.
        own: Which places of a batch are read.
        workers: Processes that read; 0 for threads of this one.
        prefetch: Batches that each worker reads ahead.
    """
    keys = _keys(len(pictures.files), batch_size, seed, epoch, start, own)
    collate = partial(_collated, size=(pictures.files.size[0], *pictures.crop))
    if workers == 0:
        yield from _by_threads(pictures, keys, collate)
        return
    yield from DataLoader(
        pictures,
        batch_sampler=keys,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=collate,
        generator=torch.Generator(),  # the default one belongs to the training
    )


def _keys(count: int, batch_size: int, seed: int, epoch: int, start: int, own: slice) -> Iterator[list[Key]]:
    for index, generator in shuffled(count, batch_size, seed, epoch, start):
        seeds = torch.randint(2**62, (len(index),), generator=generator)
        yield [Key(*pair) for pair in zip(index[own].tolist(), seeds[own].tolist(), strict=True)]


def _by_threads(
    pictures: VariedPictures, keys: Iterable[Sequence[Key]], collate: Callable[[Sequence[Example]], Batch]
) -> Iterator[Batch]:
    """Yield batches; while the step of one is made, the next is read. Pillow decodes outside Python's lock."""
    with ThreadPoolExecutor() as pool:
        waiting = None
        for batch in keys:
            found = [pool.submit(pictures.__getitem__, key) for key in batch]
            if waiting is not None:
                yield collate([future.result() for future in waiting])
            waiting = found
        if waiting is not None:
            yield collate([future.result() for future in waiting])


def _collated(found: Sequence[Example], size: tuple[int, int, int]) -> Batch:
    images = [example[0] for example in found if not isinstance(example, str)]
    labels = [example[1] for example in found if not isinstance(example, str)]
    x = torch.stack(images) if images else torch.empty(0, *size)
    x = x.contiguous(memory_format=torch.channels_last)
    return Batch(x, torch.tensor(labels, dtype=torch.long), [example for example in found if isinstance(example, str)])
