"""What tasks on images share: their configuration and the reading of their splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import bayeslayers as bl
from bayeslayers.checks import at_least_one, non_negative
from bayeslayers.distributed import World, gather_text
from recipes.data.augmentation import Augmentation
from recipes.data.image_files import ImageFiles
from recipes.data.names import by_short_name
from recipes.data.split import Split, load_split
from recipes.reports.measure import EvaluationRequest
from recipes.tasks.posterior_task import Splits
from recipes.training.config import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run on images. A `~` that a path begins with is the home folder.

    Attributes:
        augmentation: How training images are varied.
        workers: Processes that read training pictures from files; 0 for threads of the training's own.
        prefetch: Batches that each of them reads ahead.
        on_error: "raise" for a picture that cannot be read; or "skip" such pictures of a folder, and count them. All
            files that are measured on are then decoded once before the training.
        recipe: Which recipe reads this configuration.
    """

    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 0
    prefetch: int = 2
    on_error: Literal["raise", "skip"] = "raise"
    recipe: str = "classification"


def read_splits(config: Config, size: Sequence[int]) -> Splits:
    """Return the data of a run, for inputs of `size`, (c, h, w)."""
    if len(size) != 3:
        raise ValueError(f"model must take images (c, h, w), got one for inputs of shape {tuple(size)}.")
    config.augmentation.check(size)
    non_negative("workers", config.workers)
    at_least_one("prefetch", config.prefetch)
    skip, resize = config.on_error == "skip", config.augmentation.resize

    load = partial(load_split, root=config.data_root, size=size, resize=resize, skip=skip)
    train, test = load(config.data, train=True), load(config.data, train=False)
    if config.augmentation.scale is not None and not isinstance(train.images, ImageFiles):
        raise ValueError(f"augmentation.scale must be left out for data but image folders, got {config.data}.")
    refuse_same_examples(config.data, train, test)
    train, test = train.limited(config.limit), test.limited(config.limit)
    ood = {
        name: load(full, train=False, argument="evaluation.ood").limited(config.limit)
        for name, full in by_short_name(config.evaluation.ood).items()
    }
    if not config.validation:
        return Splits(train, test, "test", test, ood)
    return Splits(*train.held_out(config.validation), "val", test, ood)


def readable(split: Split, world: World) -> tuple[Split, list[str]]:
    """Return a split without the pictures that cannot be read, and what is wrong with these; ranks share the work."""
    if not isinstance(split.images, ImageFiles):
        return split, []
    own = split.images.faults(range(world.rank, len(split), world.size))
    faults = {int(key): fault for text in gather_text(json.dumps(own)) for key, fault in json.loads(text).items()}
    kept = [number for number in range(len(split)) if number not in faults]
    if not kept:
        raise ValueError(f"data must hold a picture that can be read, got {len(split)} with faults: {faults[0]}")
    return split.taken(torch.tensor(kept)) if faults else split, [faults[number] for number in sorted(faults)]


def refuse_same_examples(name: str, train: Split, test: Split) -> None:
    """Refuse a test split that is the training split."""
    if not torch.equal(train.labels, test.labels):
        return
    if isinstance(train.images, Tensor) and isinstance(test.images, Tensor):
        same = torch.equal(train.images, test.images)
    else:
        same = train.images == test.images
    if same:
        raise ValueError(
            f"data must have a test split of its own, got {name}, whose training images are its test images. Name a "
            "file for each, as npz:NAME_{split}.npz for NAME_train.npz and NAME_test.npz, or put the folders train and "
            "test into one."
        )


def read_test_splits(
    card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
) -> tuple[Split, Mapping[str, Split]]:
    """Return the test split that a request names, and those of OOD data by name, as a posterior takes them."""

    def load(name: str, argument: str) -> Split:
        split = load_split(name, data_root, train=False, size=card.input_size, resize=card.resize, argument=argument)
        return split.limited(request.limit)

    assert request.data is not None
    data = load(request.data, "data")
    return data, {name: load(full, "ood") for name, full in by_short_name(request.ood).items()}
