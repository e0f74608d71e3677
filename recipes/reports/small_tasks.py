"""Six small tasks on which defaults are measured: from data in a folder, or from stand-ins that are drawn.

The stand-ins have the shapes and sizes of the data, and other difficulties: figures on them are not those of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.likelihoods import Likelihood
from recipes.data.split import load_split

IGNORED = -100  # torch's label of positions that have none
CAMVID_CLASSES, CAMVID_VOID, FRAME = 11, 11, (48, 64)


@dataclass(frozen=True)
class Data:
    """Examples to train and to test on; `source` says where they come from."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    source: str


@dataclass(frozen=True)
class Task:
    """A small problem.

    Attributes:
        read: Function of a folder, or None for a stand-in, and a seed to the data.
        build: Function to the untrained, ordinary network.
        epochs: Passes over the training examples.
        batch_size: Examples of a step.
        likelihood: That of the outputs.
    """

    read: Callable[[Path | None, int], Data]
    build: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    likelihood: Likelihood = bl.Categorical()  # noqa: RUF009 (frozen)


def read_spiral(root: Path | None, seed: int) -> Data:
    """Return points on three arms of a spiral: 450 to train on, 1,500 to test on."""
    generator = torch.Generator().manual_seed(seed)
    return Data(*_spiral(450, generator), *_spiral(1500, generator), "spiral")


def _spiral(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    radius, arm = torch.rand(n, generator=generator), torch.arange(n) % 3
    angle = 2 * math.pi * arm / 3 + 4 * radius + 0.2 * torch.randn(n, generator=generator)
    return 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), arm


def read_images(name: str, size: tuple[int, int, int], train: int, test: int, root: Path | None, seed: int) -> Data:
    """Return some images of a set, those to train on chosen by the seed; noisy copies of a pattern per class if None.

    CIFAR-10 is also read from cifar10_train.npz and cifar10_test.npz in the folder.
    """
    if root is None:
        return _patterns(size, train, test, seed)
    arrays = root / f"{name}_{{split}}.npz"
    data = f"npz:{arrays}" if Path(str(arrays).format(split="train")).is_file() else name
    parts = [load_split(data, root, train=part) for part in (True, False)]
    chosen = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(seed))[:train]
    splits = parts[0].taken(chosen), parts[1].limited(test)
    x = splits[0].inputs(slice(None))
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x_test = (splits[1].inputs(slice(None)) - mean) / std
    return Data((x - mean) / std, splits[0].labels, x_test, splits[1].labels, name)


def _patterns(size: tuple[int, int, int], train: int, test: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, *size, generator=generator)
    y = torch.randint(10, (train + test,), generator=generator)
    x = (patterns[y] + 6 * torch.randn(train + test, *size, generator=generator)) / 37**0.5
    return Data(x[:train], y[:train], x[train:], y[train:], "stand-in")


def read_energy(root: Path | None, seed: int) -> Data:
    """Return a split of UCI's energy, scaled by the training rows; a smooth function of 8 inputs if None."""
    if root is None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(768, 8, generator=generator)
        y = (2 * x[:, 0]).sin() + x[:, 1] * x[:, 2] + x[:, 3].abs() + 0.1 * torch.randn(768, generator=generator)
        test = torch.arange(768) < 77
    else:
        with np.load(root / "uci" / "energy.npz", allow_pickle=False) as file:
            x, y = (torch.as_tensor(file[key]).float() for key in ("x", "y"))
            rows = torch.as_tensor(file["test_index"][seed % len(file["test_index"])]).long()
        test = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, rows, True)
    y = y[:, None]
    x, y = ((values - values[~test].mean(0)) / values[~test].std(0) for values in (x, y))
    return Data(x[~test], y[~test], x[test], y[test], "stand-in" if root is None else "energy")


def read_frames(root: Path | None, seed: int) -> Data:
    """Return 41 frames of CamVid to train on and 58 to test on, at 48 x 64; scenes of rectangles if None."""
    if root is None:
        x, y = _scenes(99, torch.Generator().manual_seed(seed))
        return Data(x[:41], y[:41], x[41:], y[41:], "stand-in")
    start = seed % 9
    train, test = _frames(root / "CamVid", "train", start, 9), _frames(root / "CamVid", "test", 0, 3)
    return Data(*train, *test, "camvid")


def _frames(folder: Path, split: str, start: int, every: int) -> tuple[Tensor, Tensor]:
    from PIL import Image

    files = sorted((folder / split).glob("*"))[start::every]
    if not files:
        raise FileNotFoundError(
            f"data root must hold CamVid as SegNet's tutorial lays it out, got no {folder / split}."
        )
    images, labels = [], []
    for file in files:
        (label,) = (folder / f"{split}annot").glob(f"{file.stem}.*")
        size = FRAME[1], FRAME[0]
        images.append(np.asarray(Image.open(file).convert("RGB").resize(size, Image.Resampling.BILINEAR)))
        labels.append(np.asarray(Image.open(label).resize(size, Image.Resampling.NEAREST)))
    y = torch.as_tensor(np.stack(labels)).long()
    x = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (x - 0.42) / 0.28, torch.where(y == CAMVID_VOID, IGNORED, y)


def _scenes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return scenes of eight rectangles on a background, each class of a noisy colour; a row of each is ignored."""
    colours = torch.randn(CAMVID_CLASSES, 3, generator=generator)
    y = torch.zeros(n, *FRAME, dtype=torch.long)
    for scene in y:
        for _ in range(8):
            top, left = (int(torch.randint(side, (), generator=generator)) for side in FRAME)
            scene[top : top + 16, left : left + 20] = torch.randint(CAMVID_CLASSES, (), generator=generator)
    x = colours[y].movedim(3, 1) + 0.7 * torch.randn(n, 3, *FRAME, generator=generator)
    y[:, 0] = IGNORED
    return x, y


def _toy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 3))


def _mlp() -> nn.Module:
    hidden = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


def _lenet5() -> nn.Module:
    convs = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convs, nn.Flatten(), *dense)


def _energy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 2))


def _resnet18() -> nn.Module:
    import timm

    return timm.create_model("resnet18", num_classes=10)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class SmallUnet(nn.Module):
    """A Unet of three levels, 12 to 48 channels wide."""

    def __init__(self, width: int = 12, num_classes: int = CAMVID_CLASSES):
        super().__init__()
        self.high, self.middle, self.low = _block(3, width), _block(width, 2 * width), _block(2 * width, 4 * width)
        self.up_middle, self.up_high = _block(6 * width, 2 * width), _block(3 * width, width)
        self.output = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(x)
        middle = self.middle(F.max_pool2d(high, 2))
        low = self.low(F.max_pool2d(middle, 2))
        middle = self.up_middle(torch.cat([F.interpolate(low, scale_factor=2.0), middle], 1))
        return self.output(self.up_high(torch.cat([F.interpolate(middle, scale_factor=2.0), high], 1)))


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
TASKS = {
    "toy": Task(read_spiral, _toy, 40, 32),
    "mnist": Task(partial(read_images, "mnist", _GREY, 6000, 2000), _mlp, 8, 128),
    "fashion": Task(partial(read_images, "fashion-mnist", _GREY, 4000, 2000), _lenet5, 8, 64),
    "energy": Task(read_energy, _energy, 40, 32, bl.Gaussian()),
    "resnet18": Task(partial(read_images, "cifar10", _COLOUR, 2000, 1000), _resnet18, 6, 64),
    "unet": Task(read_frames, SmallUnet, 15, 4),
}
