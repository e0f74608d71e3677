"""Images of the user's own: an .npz file of arrays, or a folder of pictures by class."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.images import header, images_in, open_image, reduced, visible

_GREY, _COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of 8 bits or fewer
_PROBED = 16  # pictures of a folder whose colours are looked at before any is decoded
_WRITE = "Write it by numpy.savez, with the arrays images and labels."


def read_npz(path: str, *, train: bool, argument: str = "data") -> tuple[Tensor, Tensor, list[str]]:
    """Return images `(n, c, h, w)`, labels and classes of an .npz file.

    It holds `images`, bytes `(n, h, w)` or `(n, h, w, 3)`, `labels`, integers `(n,)`, and may hold `classes`, names.

    Args:
        path: The file. "{split}" in it stands for train or test; without, the file is either split.
        train: The training split, else the test split.
        argument: What errors say was to name it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else. Nothing in it is unpickled.
    """
    file = Path(path.replace("{split}", "train" if train else "test"))
    if not file.is_file():
        raise FileNotFoundError(f"{argument} must be an .npz file, got {file}: there is no such file. {_WRITE}")
    try:
        # numpy takes a file that is no archive for a pickle, and says how to load that.
        with zipfile.ZipFile(file), file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {key: content[key] for key in ("images", "labels", "classes") if key in content}
    # What zipfile and numpy raise for damaged files.
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{argument} must be an .npz file of plain arrays, got {file}: {reason}. {_WRITE}") from None
    for key in ("images", "labels"):
        if key not in arrays:
            raise ValueError(f"{file} must hold the array '{key}', got {', '.join(arrays) or 'none that is known'}.")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(
            f"images of {file} must be bytes of shape (n, h, w) or (n, h, w, 3), got {images.dtype} {images.shape}."
        )
    if 0 in images.shape:
        raise ValueError(f"{argument} must hold at least one image, got {file} with images of shape {images.shape}.")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
        raise ValueError(
            f"labels of {file} must be a class index for each of the {len(images)} images, got {labels.dtype} "
            f"{labels.shape}{f' from {labels.min()}' if labels.size and labels.dtype.kind == 'i' else ''}."
        )
    classes = [str(name) for name in np.atleast_1d(arrays.get("classes", np.arange(int(labels.max()) + 1)))]
    if len(classes) <= labels.max():
        raise ValueError(f"classes of {file} must name label {labels.max()}, got {len(classes)} names.")
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if images.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels.astype(np.int64)), classes


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, decoded each time they are read: a set that need not fit into memory.

    Attributes:
        paths: The files.
        size: `(c, h, w)` of the images: of each picture the middle that has this shape is taken, and resized.
    """

    paths: Sequence[Path]
    size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return images as bytes, `(n, c, h, w)`."""
        paths = [self.paths[number] for number in torch.arange(len(self))[index].tolist()]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            images = list(pool.map(partial(_decode, size=self.size), paths))
        return torch.stack(images) if images else torch.empty(0, *self.size, dtype=torch.uint8)

    def read(self, number: int, whole: bool = False) -> Tensor:
        """Return an image as bytes, `(c, h, w)`.

        Args:
            number: Of the file.
            whole: Return the picture as it is, of whatever size.

        Raises:
            ValueError: If it cannot be read.
        """
        return _decode(self.paths[number], self.size, whole)

    def faults(self, numbers: Sequence[int]) -> dict[int, str]:
        """Return what is wrong with those files of these numbers that cannot be read."""
        with ThreadPoolExecutor() as pool:
            found = pool.map(self._fault, numbers)
        return {number: fault for number, fault in zip(numbers, found, strict=True) if fault is not None}

    def _fault(self, number: int) -> str | None:
        try:
            self.read(number)
        except (ValueError, OSError) as error:
            return str(error)

    def taken(self, index: Tensor) -> ImageFiles:
        """Return the images of these numbers."""
        return ImageFiles([self.paths[number] for number in index.tolist()], self.size)


def read_folder(
    path: str, *, train: bool, size: Sequence[int] | None = None, argument: str = "data", skip: bool = False
) -> tuple[ImageFiles, Tensor, list[str]]:
    """Return images, labels and classes of a folder of pictures in ImageNet's layout.

    That is `PATH/train/CLASS/*.png`, and `PATH/test` or `PATH/val` alike; a folder with none of these is itself
    either split. Classes are numbered in the order of their names. What hides in the folder is left out: files and
    folders whose names begin with a dot, and those that systems add, as `__MACOSX`.

    Args:
        path: The folder.
        train: The training split, else the test split.
        size: `(c, h, w)` of the images; None for that of the first.
        argument: As for `read_npz`.
        skip: Look past pictures that cannot be read.

    Raises:
        FileNotFoundError: If there is no such folder, or a class without pictures.
        ValueError: If a class is none of the training split, a picture cannot be read, or the pictures are grey
            and asked for in colour, or the other way round.
    """
    root = Path(path)
    layout = f"Lay pictures out as {root}/train/CLASS/*.png and {root}/test/CLASS/*.png."
    if not root.is_dir():
        raise FileNotFoundError(f"{argument} must be a folder, got {root}: there is no such folder. {layout}")
    there = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    wanted = [name for name in there if (name == "train") is train]
    if there and not wanted:
        raise FileNotFoundError(
            f"{argument} must hold {'train' if train else 'test or val'}, got {root} with {', '.join(there)} alone."
        )
    folder = root / wanted[0] if wanted else root
    pictures = {name: images_in(folder / name) for name in _classes(folder)}
    numbers = {name: number for number, name in enumerate(_classes(root / "train" if "train" in there else folder))}
    if strange := [name for name in pictures if name not in numbers]:
        raise ValueError(f"classes of {folder} must be those of {root / 'train'}, got {', '.join(strange[:5])} too.")
    if not all(pictures.values()) or not pictures:
        empty = ", ".join(name for name, files in pictures.items() if not files)
        raise FileNotFoundError(
            f"{argument} must hold pictures in a folder for each class, got {folder} with none for "
            f"{f'the classes {empty}' if empty else 'any class'}. {layout}"
        )
    paths = [path for files in pictures.values() for path in files]
    labels = torch.tensor([numbers[name] for name, files in pictures.items() for _ in files])
    return ImageFiles(paths, _size_of(paths, size, skip)), labels, list(numbers)


def _classes(folder: Path) -> list[str]:
    """Return the folders in a folder, in order, without those that hide in it."""
    return visible(entry.name for entry in folder.iterdir() if entry.is_dir())


def _size_of(paths: Sequence[Path], size: Sequence[int] | None, skip: bool) -> tuple[int, int, int]:
    """Return the size to decode to, after a look whether the pictures have its colours."""
    heads = []
    for path in paths[:: -(-len(paths) // _PROBED)]:
        with suppress(ValueError) if skip else nullcontext(), header(path) as image:
            heads.append((image.mode, image.height, image.width))
    if not heads:
        raise ValueError(f"data must hold a picture that can be read, got {paths[0].parent} without any.")
    colours = 3 if any(mode in _COLOUR for mode, _, _ in heads) else 1
    if size is None:
        return colours, *heads[0][1:]
    channels, height, width = size
    check_colours(str(paths[0].parent), colours, channels)
    return channels, height, width


def check_colours(name: str, got: int, expected: int) -> None:
    """Refuse grey images where the model takes RGB, and the other way round."""
    words = {1: "grey", 3: "RGB"}
    if got != expected:
        raise ValueError(
            f"images of {name} must be {words.get(expected, f'of {expected} channels')} as the model takes them, got "
            f"{words[got]} ones."
        )


def _decode(path: Path, size: tuple[int, int, int], whole: bool = False) -> Tensor:
    """Return a picture as bytes `(c, h, w)`, upright, and white where it is transparent; of its own size if `whole`."""
    from PIL import Image, ImageOps

    channels, height, width = size
    picture = open_image(path)
    # Some of ImageNet's photographs are grey, which RGB can hold; a grey image cannot hold colours.
    if picture.mode not in _GREY + _COLOUR * (channels == 3):
        kind = "grey, of 8 bits" if channels == 1 else "of 8 bits a channel"
        raise ValueError(f"image must be {kind}, got {path} of Pillow's mode {picture.mode}.")
    colours = "L" if channels == 1 else "RGB"
    if picture.has_transparency_data:
        picture = reduced(picture.convert("RGBA"), (height, width))
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = reduced(picture.convert(colours), (height, width))
    if not whole:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, channels).permute(2, 0, 1)
