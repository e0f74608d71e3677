"""Opening images within limits: the header is checked before a pixel is decoded, and EXIF orientation is applied."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_PIXELS = 2**26  # 256 MiB once decoded, whatever the file's header claims
_AMPLE_PIXELS = 2**22  # images up to this size are not reduced
_GAP = 4  # sides of a reduced image over those that it is resized to; beyond 3 the result looks the same
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_DRAWN = ("EPS", "WMF")  # formats that Pillow passes to another program


def open_image(source: str | Path | Image) -> Image:
    """Return an image, decoded and upright, as viewers show it.

    Its size is read from the header before anything is decoded: a few kilobytes of PNG can claim gigabytes.

    Args:
        source: File, or an image of Pillow, which is left unchanged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or has more than 2^26 pixels.
    """
    from PIL import ImageOps

    with header(source) as image:
        return ImageOps.exif_transpose(image)  # decodes it


@contextmanager
def header(source: str | Path | Image) -> Iterator[Image]:
    """Open an image without decoding it; every error of Pillow inside the scope becomes one sentence.

    Args:
        source: As for `open_image`.
    """
    from PIL import Image

    if not isinstance(source, Image.Image) and not Path(source).is_file():
        raise FileNotFoundError(f"image not found: {source}.")
    name = f"a {source.mode} image" if isinstance(source, Image.Image) else str(source)
    try:
        if isinstance(source, Image.Image):
            _check(source)
            yield source
        else:
            with Image.open(source) as image:
                _check(image)
                yield image
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        reason = str(error).rstrip(".")
        raise ValueError(f"image must be a picture that Pillow reads, got {name}: {reason}.") from None


def _check(image: Image) -> None:
    if image.format in _DRAWN:
        raise ValueError(f"its format, {image.format}, needs another program to render. Save it as PNG")
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"its {image.width} x {image.height} pixels exceed the limit of {_MOST_PIXELS}. Make it smaller"
        )


def reduced(image: Image, size: Sequence[int]) -> Image:
    """Return an image of more than 2^22 pixels averaged over squares of pixels, before it is resized to `size`, (h, w).

    The cost of the following steps then depends on the network's input, not on the file. Images of Pillow's modes
    "1", "P" and "I;16" cannot be averaged and are returned unchanged.

    Args:
        image: Image.
        size: Height and width of the later resize; the result is at least 4 times as large.
    """
    factor = min(image.height // (_GAP * size[0]), image.width // (_GAP * size[1]))
    if factor < 2 or image.width * image.height <= _AMPLE_PIXELS or image.mode in ("1", "P") or ";" in image.mode:
        return image
    return image.reduce(factor)


def images_in(folder: str | Path) -> list[Path]:
    """Return the image files of a folder, at any depth and in order, without hidden files and folders.

    Args:
        folder: Folder.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = visible(folders)
        found += [(place, name) for name in visible(names) if name.lower().endswith(_SUFFIXES)]
    return [Path(place, name) for place, name in sorted(found)]


def visible(names: Iterable[str]) -> list[str]:
    """Return the names of files and folders that are neither hidden nor made by the system, in order.

    >>> visible(["dog", ".ipynb_checkpoints", "cat", "__MACOSX", "._0.png"])
    ['cat', 'dog']
    """
    return sorted(name for name in names if not name.startswith(".") and name not in _OF_SYSTEMS)
