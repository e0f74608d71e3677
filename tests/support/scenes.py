"""Pictures with masks in the layouts of CamVid and Cityscapes: sky above a car on a road, and some void."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Sky, road, car and void, by the values that masks of each set have.
CAMVID, CITYSCAPES = (0, 3, 8, 11), (23, 7, 26, 0)
COLOURS = np.array([(60, 120, 200), (100, 60, 100), (0, 0, 140), (30, 30, 30)])


def scene(number: int, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture and which of the four each pixel is."""
    kinds = np.ones((height, width), dtype=np.uint8)
    kinds[: height // 3] = 0
    left = number % (width // 2)
    kinds[height // 3 : height // 2, left : left + width // 3] = 2
    kinds[-2:] = 3
    noise = rng.integers(-20, 21, (height, width, 3))
    return np.clip(COLOURS[kinds] + noise, 0, 255).astype(np.uint8), kinds


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_cityscapes(root: Path, size: tuple[int, int] = (32, 64), counts: tuple[int, int] = (8, 3)) -> Path:
    """Write a folder as torchvision reads Cityscapes, and return it."""
    rng, values = np.random.default_rng(0), np.array(CITYSCAPES, dtype=np.uint8)
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            city = ("aachen", "bochum")[number % 2]
            image, kinds = scene(number, *size, rng)
            name = f"{city}_{number:06d}_000019"
            save(image, root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            save(values[kinds], root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png")
            save(kinds, root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png")  # of no concern
    return root


def write_camvid(root: Path, size: tuple[int, int] = (36, 48), counts: tuple[int, int, int] = (4, 2, 2)) -> Path:
    """Write a folder as SegNet's edition of CamVid, and return that above it."""
    rng, values = np.random.default_rng(0), np.array(CAMVID, dtype=np.uint8)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for number in range(count):
            image, kinds = scene(number, *size, rng)
            save(image, root / "CamVid" / split / f"{number}.png")
            save(values[kinds], root / "CamVid" / f"{split}annot" / f"{number}.png")
    return root
