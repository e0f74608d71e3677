"""The examples on which a posterior is verified, and its network as it predicts them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import bayeslayers as bl
import zoo
from recipes.data.examples import Points
from recipes.data.names import without_split
from recipes.data.segmentation_sets import SETS, load_scenes
from recipes.data.slices import load_slice, sliced
from recipes.data.split import NAMES, Split, load_split
from recipes.data.tables import UCI, load_table
from recipes.data.task_sequence import Joined
from zoo.networks.segmentation import labels_pixels

MOST_PIXELS = 2**19  # of a test split with a label for each pixel, whose predictions are held in memory
InMemory = Split | Points | Joined


def read_slice(name: str, card: bl.Card) -> InMemory:
    """Return a bundled slice as a posterior takes it."""
    return load_slice(name, card.input_size, card.resize)


def read_test_split(name: str, data_root: str | Path | None, card: bl.Card) -> InMemory:
    """Return a test split as a posterior takes it; that of a data set that nothing but its slice is of, the slice.

    Of pictures with a label for each pixel it is so many as memory holds, from all over the split.
    """
    if name in SETS:
        scenes = load_scenes(name, data_root, "test")
        scenes = scenes.limited(max(2, MOST_PIXELS // scenes.inputs(slice(1))[0, 0].numel()))
        return Split(scenes.inputs(slice(None)).mul(255).round().byte(), scenes.targets[:], scenes.classes)
    base, number = without_split(name)
    if base in UCI:
        return load_table(base, data_root).split(number)[1]
    if name in sliced() and name not in NAMES:
        return read_slice(name, card)
    return load_split(name, data_root, train=False, size=card.input_size, resize=card.resize)


def as_predicted(model: nn.Module) -> nn.Module:
    """Return a network as it predicts: one with an output for each pixel, at the size of its inputs."""
    card = zoo.card_of(model)
    return bl.SlidingWindow(model, card.input_size[1:]) if labels_pixels(card) else model
