"""What tasks on images share: their configuration and the reading of their splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import bayeslayers as bl
from recipes.data.augmentation import Augmentation
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
        recipe: Which recipe reads this configuration.
    """

    augmentation: Augmentation = field(default_factory=Augmentation)
    recipe: str = "classification"


def read_splits(config: Config, size: Sequence[int]) -> Splits:
    """Return the data of a run, for inputs of `size`, (c, h, w)."""
    if len(size) != 3:
        raise ValueError(f"model must take images (c, h, w), got one for inputs of shape {tuple(size)}.")
    config.augmentation.check(size)

    load = partial(load_split, root=config.data_root, size=size, resize=config.augmentation.resize)
    train, test = load(config.data, train=True), load(config.data, train=False)
    refuse_same_examples(config.data, train, test)
    train, test = train.limited(config.limit), test.limited(config.limit)
    ood = {
        name: load(full, train=False, argument="evaluation.ood").limited(config.limit)
        for name, full in by_short_name(config.evaluation.ood).items()
    }
    if not config.validation:
        return Splits(train, test, "test", test, ood)
    return Splits(*train.held_out(config.validation), "val", test, ood)


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
