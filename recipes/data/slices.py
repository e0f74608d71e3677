"""The bundled slices of test data, on which a posterior is verified without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayeslayers.checks import did_you_mean
from recipes.data.examples import Points
from recipes.data.names import short_name
from recipes.data.segmentation_sets import load_scenes
from recipes.data.split import Split, load_split, sides
from recipes.data.task_sequence import NAMES, Joined, base_of, sequence

SLICES = Path(__file__).parents[1] / "assets" / "slices"


def sliced() -> list[str]:
    """Return the names of the data sets with bundled examples, sorted."""
    found = {path.stem for path in SLICES.glob("*.safetensors")}
    return sorted(found | {name for name in NAMES if base_of(name) in found})


def load_slice(name: str, size: Sequence[int] | None = None, resize: int | None = None) -> Split | Points | Joined:
    """Return the bundled examples of a data set's test split.

    Args:
        name: Data set.
        size: As for `load_split`.
        resize: As for `load_split`.

    Raises:
        ValueError: If it has none.
    """
    if name not in sliced():
        raise ValueError(
            f"data set must have a bundled slice, got {name!r}.{did_you_mean(name, sliced())} {', '.join(sliced())} do."
        )
    if name in NAMES:
        assert size is not None
        return _slice_of_tasks(name, size[0])
    tensors = load_file(SLICES / f"{name}.safetensors")
    if "y" in tensors:
        return Points(tensors["x"], tensors["y"])
    labels = tensors["labels"].long()
    if "images" not in tensors:
        x = tensors["x"]
        return Points(x if x.is_floating_point() else x.long(), labels)
    if labels.dim() == 3:  # a label for each pixel, of a network that takes any size
        return Split(tensors["images"], labels, [])
    whole, crop = sides(size, resize)
    return Split(tensors["images"], labels, [], whole and whole[1:], crop)


def _slice_of_tasks(name: str, features: int) -> Joined:
    """Return the slice of the data set that a sequence of tasks is made from, every k-th image for each task."""
    whole = load_slice(base_of(name))
    assert isinstance(whole, Split)
    tasks = sequence(name, whole, features)
    return Joined([task.limited(len(whole) // len(tasks)) for task in tasks])


def write_slice(name: str, data_root: str | Path | None = None, count: int = 300) -> Path:
    """Write every k-th example of a data set's test split as its bundled slice, and return the file.

    Args:
        name: Data set.
        data_root: Folder of data, as for `load_split`.
        count: Examples.

    Raises:
        ValueError: If it has fewer examples, or too many classes for a byte.
    """
    split = load_split(name, data_root, train=False)
    if not 1 <= count <= len(split):
        raise ValueError(f"count must be from 1 to the {len(split)} examples of {name}, got {count}.")
    index = torch.arange(count) * (len(split) // count)
    return _save_slice(short_name(name), "images", split.images[index], split.labels[index])


def write_scene_slice(name: str, size: tuple[int, int], count: int, data_root: str | Path | None = None) -> Path:
    """Write pictures of a test split at equal distances, made smaller, with the nearest pixels' labels as its slice.

    Args:
        name: Data set with a label for each pixel.
        size: Height and width.
        count: Pictures.
        data_root: Folder of data, as for `load_scenes`.
    """
    scenes = load_scenes(name, data_root, "test")
    scenes = scenes.taken(torch.arange(count) * len(scenes) // count)
    x = F.interpolate(scenes.inputs(slice(None)), size, mode="bilinear", antialias=True)
    labels = F.interpolate(scenes.targets[:][:, None].float(), size, mode="nearest-exact")[:, 0].long()
    return _save_slice(name, "images", (255 * x).round().clamp(0, 255).byte(), labels)


def save_slice(name: str, points: Points) -> Path:
    """Write examples as a data set's bundled slice, and return the file: real targets as they are, ids in two bytes."""
    if points.labels.is_floating_point():
        SLICES.mkdir(parents=True, exist_ok=True)
        save_file({"x": points.x.contiguous(), "y": points.labels.contiguous()}, SLICES / f"{name}.safetensors")
        return SLICES / f"{name}.safetensors"
    x = points.x if points.x.is_floating_point() else points.x.short()
    return _save_slice(name, "x", x, points.labels)


def _save_slice(name: str, kind: str, inputs: Tensor, labels: Tensor) -> Path:
    if int(labels.max()) > 255:
        raise ValueError(f"labels must be < 256 for a slice, which keeps them as bytes, got {int(labels.max())}.")
    SLICES.mkdir(parents=True, exist_ok=True)
    save_file({kind: inputs.contiguous(), "labels": labels.to(torch.uint8)}, SLICES / f"{name}.safetensors")
    return SLICES / f"{name}.safetensors"
