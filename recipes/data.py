"""Data sets as tensors, and batches of them in an order that depends on seed and epoch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayeslayers.checks import near
from recipes.image_files import ImageFiles, check_colours, read_folder, read_npz

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
    """

    images: Tensor | ImageFiles
    labels: Tensor
    classes: list[str]
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return images as `ToTensor` gives them, float in [0, 1]."""
        x = self.images[index].float() / 255
        if self.size in (None, x.shape[2:]):
            return x
        from torchvision.transforms.v2.functional import resize

        # Resizing averages, but its weights sum to 1 only within rounding.
        return resize(x, list(self.size), antialias=True).clamp(0, 1)

    def head(self, limit: int | None) -> Split:
        """Return the first `limit` examples, all if None."""
        if limit is None:
            return self
        images = self.images.head(limit) if isinstance(self.images, ImageFiles) else self.images[:limit]
        return dataclasses.replace(self, images=images, labels=self.labels[:limit])


def load_split(name: str, root: str | Path | None, *, train: bool, size: Sequence[int] | None = None) -> Split:
    """Return a split of a data set.

    Args:
        name: A key of `NAMES`, a torchvision data set; "npz:PATH", see `read_npz`; or "imagefolder:PATH", see
            `read_folder`.
        root: Folder of torchvision's data already there, as it lays it out. None: the folder `data`,
            where the set is downloaded to if need be.
        train: The training split, else the test split.
        size: `(c, h, w)` of the inputs; None for that of the images.

    Raises:
        ValueError: If the name is unknown, the data is damaged, or its images are grey where `size` is for
            colours, or the other way round.
        FileNotFoundError: If there is no such data.
        ConnectionError: If it could not be downloaded.
    """
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return Split(*read_folder(path, train=train, size=size))
    if kind == "npz" and path:
        images, labels, classes = read_npz(path, train=train)
    elif name in NAMES:
        images, labels, classes = _read_torchvision(name, root, train)
    else:
        raise ValueError(
            f"unknown data set {name!r}.{near(name, NAMES)} Known: {', '.join(NAMES)}, npz:PATH, imagefolder:PATH."
        )
    if size is None:
        return Split(images, labels, classes)
    channels, height, width = size
    check_colours(name, images.shape[1], channels)
    return Split(images, labels, classes, (height, width))


def short_name(name: str) -> str:
    """Return the name of a data set without the place of its files.

    >>> short_name("npz:data/ood/notmnist_{split}.npz"), short_name("imagefolder:data/pets/"), short_name("svhn")
    ('notmnist', 'pets', 'svhn')
    """
    kind, colon, path = name.partition(":")
    if not (colon and path):
        return name
    folder_or_file = Path(path.replace("{split}", ""))
    return (folder_or_file.stem if kind == "npz" else folder_or_file.name).strip("_-. ") or name


def _read_torchvision(name: str, root: str | Path | None, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    from urllib.error import URLError

    from torchvision import datasets

    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = getattr(datasets, NAMES[name])(root or "data", download=root is None, **which)
    except ModuleNotFoundError as error:  # SVHN's files are MATLAB's
        raise RuntimeError(f"{NAMES[name]} needs {error.name} to read its files. pip install {error.name}.") from None
    except (RuntimeError, URLError) as error:
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
