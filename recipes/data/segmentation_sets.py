"""CamVid and Cityscapes in the layouts in which they are handed out, as splits of pictures with masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from bayeslayers.checks import did_you_mean
from recipes.data.segmentation_files import IGNORED, Labels, Pair, Scenes
from zoo.images import images_in

CAMVID_CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign symbol", "fence", "car", "pedestrian", "bicyclist"),
)
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the 19 classes
Part = Literal["train", "val", "test"]


def _camvid(root: Path, part: Part) -> list[Pair]:
    """Return the files of SegNet's edition: `CamVid/train/*`, their masks `CamVid/trainannot/*`."""
    home = root / "CamVid" if (root / "CamVid").is_dir() else root
    images, masks = (_folder(home / name, part, "CamVid", f"{home}/{part} and {part}annot") for name in _names(part))
    return _paired(images_in(images), {path.stem: path for path in images_in(masks)}, lambda path: path.stem, masks)


def _names(part: Part) -> tuple[str, str]:
    return part, f"{part}annot"


def _cityscapes(root: Path, part: Part) -> list[Pair]:
    """Return the files of torchvision's layout: `leftImg8bit/train/CITY/*`, `gtFine/train/CITY/*_gtFine_labelIds.png`.

    The official test split has no labels: the official val split is that which results are measured on.
    """
    split = "train" if part == "train" else "val"
    layout = f"{root}/leftImg8bit/{split}/CITY and {root}/gtFine/{split}/CITY"
    folders = [_folder(root / name / split, split, "Cityscapes", layout) for name in ("leftImg8bit", "gtFine")]
    ending = "_gtFine_labelIds.png"
    masks = {_frame(path): path for path in images_in(folders[1]) if path.name.endswith(ending)}
    return _paired(images_in(folders[0]), masks, _frame, folders[1])


def _frame(path: Path) -> str:
    """Return city, sequence and frame of a file of Cityscapes."""
    return path.name.removesuffix("_gtFine_labelIds.png").partition("_leftImg8bit")[0]


class SceneSet(NamedTuple):
    """A data set.

    Attributes:
        pairs: Function of its folder and a split to the split's files.
        labels: What its masks hold.
        own_val: Whether it has a split for validation beside that for tests.
    """

    pairs: Callable[[Path, Part], list[Pair]]
    labels: Labels
    own_val: bool


SETS: Mapping[str, SceneSet] = {
    "camvid": SceneSet(
        _camvid,
        Labels(CAMVID_CLASSES, {**{number: number for number in range(11)}, 11: IGNORED}),
        own_val=True,
    ),
    "cityscapes": SceneSet(
        _cityscapes,
        Labels(
            CITYSCAPES_CLASSES,
            dict.fromkeys([*range(35), 255], IGNORED) | {value: k for k, value in enumerate(_CITYSCAPES_IDS)},
        ),
        own_val=False,
    ),
}


def load_scenes(name: str, root: str | Path | None, part: Part, skip: bool = False, argument: str = "data") -> Scenes:
    """Return a split of a data set, its files checked as `Scenes.checked` does.

    Args:
        name: A key of `SETS`.
        root: Folder of the data; `data` if None.
        part: The split. Where a set has no split of its own for validation, "val" and "test" are the same.
        skip: Leave out pictures that cannot be read, or whose masks do not fit, instead of raising.
        argument: What errors say was to name it.

    Raises:
        FileNotFoundError: If there is no such folder, or a picture has no mask.
        ValueError: If the name is unknown, or a file has a fault.
    """
    if name not in SETS:
        raise ValueError(
            f"{argument} must be a set with a label for each pixel, {' or '.join(SETS)}, got {name!r}."
            f"{did_you_mean(name, SETS)}"
        )
    scenes = SETS[name]
    return Scenes(scenes.pairs(Path(root or "data"), part), scenes.labels).checked(skip)


def _folder(path: Path, part: str, title: str, layout: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"data root must hold the split {part} of {title}, got no folder {path}. Lay it out as {layout}, and name "
            "its folder by --data-root."
        )
    return path


def _paired(images: list[Path], masks: Mapping[str, Path], key: Callable[[Path], str], folder: Path) -> list[Pair]:
    """Return each image with its mask.

    Raises:
        FileNotFoundError: If there are no images, or one has no mask.
    """
    if not images:
        raise FileNotFoundError(f"a split must hold pictures, got none beside the masks of {folder}.")
    if missing := [path for path in images if key(path) not in masks]:
        raise FileNotFoundError(
            f"every picture must have a mask in {folder}, got {missing[0]} and {len(missing) - 1} more without one."
            if len(missing) > 1
            else f"every picture must have a mask in {folder}, got {missing[0]} without one."
        )
    return [Pair(path, masks[key(path)]) for path in images]
