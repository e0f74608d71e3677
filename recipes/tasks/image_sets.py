"""The data of a run: what it trains on, what measures it, and the refusal of what would not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import bayeslayers as bl
from recipes.data.names import by_short_name
from recipes.data.split import Split, load_split
from recipes.training.config import Config


@dataclass(frozen=True)
class Sets:
    """The data of a run.

    Attributes:
        train: Examples to train on.
        held_out: Examples to measure on after each epoch.
        split: Which these are, "val" or "test".
        test: Examples to measure the result on.
        ood: Examples of other data, by name.
    """

    train: Split
    held_out: Split
    split: str
    test: Split
    ood: dict[str, Split]


def read_sets(config: Config, size: Sequence[int]) -> Sets:
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
        return Sets(train, test, "test", test, ood)
    return Sets(*train.held_out(config.validation), "val", test, ood)


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


def check_classes(model: nn.Module, sets: Sets, method: str) -> None:
    """Refuse data whose labels are not the model's outputs, and a way to predict that the model has not."""
    device = next(model.parameters()).device
    x, _ = next(iter(sets.test.in_order(1, device)))
    own = torch.Generator(device)  # the training's draws of dropout stay what they are
    prediction = bl.predict(model, x, num_samples=1, method=method, generator=own)  # pyright: ignore[reportArgumentType]
    outputs = prediction.probs.shape[1]
    names = sets.train.classes
    if len(names) != outputs or sets.test.classes != names:
        other = f", of other names in the test split ({len(sets.test.classes)})" if sets.test.classes != names else ""
        raise ValueError(
            f"data must have a class for each of the model's {outputs} outputs, got {len(names)}{other}. Set "
            "model.num_classes, and name the classes in the data."
        )
