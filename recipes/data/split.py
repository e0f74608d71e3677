"""Data sets as tensors, and batches of them in an order that depends on seed and epoch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayeslayers.checks import did_you_mean
from recipes.data.augmentation import Augmentation
from recipes.data.examples import held_out_index, limited_index, shuffled
from recipes.data.image_files import ImageFiles, check_colours, read_folder, read_npz
from zoo.transforms import fitted, middle

NAMES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}


@dataclass(frozen=True)
class Split:
    """One split of a data set of images.

    Attributes:
        images: Bytes `(n, c, h, w)`, or files that are decoded to them.
        labels: Class indices `(n,)`.
        classes: Names of the classes.
        size: Height and width that inputs are resized to; None for those of the images.
        crop: Height and width of the middle of that which an input is; None for the whole.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: list[str]
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Tensor:
        """The labels."""
        return self.labels

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return images as `ToTensor` gives them, float in [0, 1]."""
        x = self._resized(index)
        return x if self.crop is None else middle(x, self.crop)

    def varied(
        self,
        index: Tensor,
        augmentation: Augmentation,
        generator: torch.Generator,
        own: slice = slice(None),
    ) -> Tensor:
        """Return images as `inputs`, each cropped and mirrored at random: the part `own` of the batch `index`."""
        x = self._resized(index[own])
        return augmentation(x, self.crop or (x.shape[2], x.shape[3]), generator, own, len(index))

    def _resized(self, index: Tensor | slice) -> Tensor:
        x = self.images[index].float() / 255
        if self.size in (None, x.shape[2:]):
            return x
        return fitted(x, self.size)

    def limited(self, limit: int | None) -> Split:
        """Return `limit` examples from all over the split, in its order and always the same; all if None."""
        if limit is None or limit >= len(self):
            return self
        return self.taken(limited_index(len(self), limit))

    def taken(self, index: Tensor) -> Split:
        """Return the examples of these numbers."""
        images = self.images.taken(index) if isinstance(self.images, ImageFiles) else self.images[index]
        return dataclasses.replace(self, images=images, labels=self.labels[index])

    def held_out(self, count: int) -> tuple[Split, Split]:
        """Return the split without `count` examples, chosen at random but always the same, and these.

        Raises:
            ValueError: If none would be left.
        """
        rest, out = held_out_index(len(self), count)
        return self.taken(rest), self.taken(out)


def load_split(
    name: str,
    root: str | Path | None,
    *,
    train: bool,
    size: Sequence[int] | None = None,
    resize: int | None = None,
    argument: str = "data",
    skip: bool = False,
) -> Split:
    """Return a split of a data set.

    Args:
        name: A key of `NAMES`, a torchvision data set; "npz:PATH", see `read_npz`; or "imagefolder:PATH", see
            `read_folder`.
        root: Folder of torchvision's data already there, as it lays it out. None: the folder `data`,
            where the set is downloaded to if need be.
        train: The training split, else the test split.
        size: `(c, h, w)` of the inputs; None, or of another number of dimensions, for that of the images.
        resize: Side that images are resized to before `size` is cropped from them; None for that of `size`.
        argument: What errors say was to name it.
        skip: Look past pictures of a folder that cannot be read.

    Raises:
        ValueError: If the name is unknown, the data is damaged, or its images are grey where `size` is for
            colours, or the other way round.
        FileNotFoundError: If there is no such data.
        ConnectionError: If it could not be downloaded.
    """
    size, crop = sides(size, resize)
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return Split(*read_folder(path, train=train, size=size, argument=argument, skip=skip), crop=crop)
    if kind == "npz" and path:
        images, labels, classes = read_npz(path, train=train, argument=argument)
    elif name in NAMES:
        images, labels, classes = _read_torchvision(name, root, train, argument)
    else:
        raise ValueError(
            f"unknown data set {name!r}.{did_you_mean(name, NAMES)} Known: {', '.join(NAMES)}, npz:PATH, "
            "imagefolder:PATH."
        )
    if size is None:
        return Split(images, labels, classes)
    channels, height, width = size
    check_colours(name, images.shape[1], channels)
    return Split(images, labels, classes, (height, width), crop)


def sides(size: Sequence[int] | None, resize: int | None) -> tuple[tuple[int, int, int] | None, tuple[int, int] | None]:
    """Return the shape `(c, h, w)` to resize to and the height and width of the middle to take, as of a `Split`.

    Both are None where nothing is asked for, or inputs are no images.
    """
    if size is None or len(size) != 3:
        return None, None
    channels, height, width = size
    return ((channels, height, width), None) if resize is None else ((channels, resize, resize), (height, width))


def _read_torchvision(
    name: str, root: str | Path | None, train: bool, argument: str
) -> tuple[Tensor, Tensor, list[str]]:
    from urllib.error import URLError

    from torchvision import datasets

    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = getattr(datasets, NAMES[name])(root or "data", download=root is None, **which)
    except ModuleNotFoundError as error:  # SVHN's files are MATLAB's
        raise RuntimeError(f"{NAMES[name]} needs {error.name} to read its files. pip install {error.name}.") from None
    except (RuntimeError, URLError) as error:
        if root is None:
            raise ConnectionError(
                f"{NAMES[name]} could not be downloaded: {error}. Give --data-root, or another set as {argument}."
            ) from None
        raise FileNotFoundError(
            f"data root must hold {NAMES[name]} as torchvision lays it out, got {root} without it. Leave --data-root "
            f"out to download it, or give another set as {argument}."
        ) from None
    except (ValueError, AssertionError, LookupError):  # what torchvision raises for damaged files
        raise ValueError(
            f"{NAMES[name]} must be as torchvision lays it out, got a damaged file in {root or 'data'}. "
            "Download it again."
        ) from None
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets)
    if len(images) != len(labels):
        raise ValueError(f"{NAMES[name]} must have a label per image, got {len(labels)} for {len(images)}.")
    if images.dim() == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    classes = data.classes if hasattr(data, "classes") else range(10)
    return images, labels.long(), [str(name) for name in classes]


def batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 (never written to)
    own: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's full batches, or the part `own` of each, shuffled, from number `start` on, see `shuffled`.

    Colours are the innermost dimension in memory, which convolutions on the CPU are faster for.
    """
    for index, generator in shuffled(len(split), batch_size, seed, epoch, start):
        x = split.varied(index, augmentation, generator, own)
        yield x.contiguous(memory_format=torch.channels_last), split.labels[index[own]]
