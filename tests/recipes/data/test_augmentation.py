from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recipes.data.augmentation import Augmentation
from recipes.data.split import Split, batches
from zoo.transforms import middle

# Every pixel says where it is: 1 + row * 10 + column.
GRID = (1.0 + torch.arange(6)[:, None] * 10 + torch.arange(5)).expand(1, 6, 5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(padding, size):
    """All crops of the padded grid, upright and mirrored."""
    padded = torch.zeros(1, 6 + 2 * padding, 5 + 2 * padding)
    padded[:, padding : padding + 6, padding : padding + 5] = GRID
    height, width = size
    return [
        padded[:, top : top + height, left : left + width]
        for top in range(padded.shape[1] - height + 1)
        for left in range(padded.shape[2] - width + 1)
    ]


@pytest.mark.parametrize(
    ("padding", "size", "flip"), [(2, (6, 5), False), (1, (6, 5), True), (0, (4, 3), True), (0, (6, 5), True)]
)
def test_each_crop_and_mirror_image_comes_equally_often(padding, size, flip):
    expected = windows(padding, size)
    expected += [crop.flip(2) for crop in expected] * flip
    each = 200
    x = GRID.expand(each * len(expected), 1, 6, 5)
    found = Augmentation(padding=padding, flip=flip)(x, size, generator())
    assert found.shape == (len(x), 1, *size)
    counts = torch.tensor([int((found == crop).all((1, 2, 3)).sum()) for crop in expected])
    assert counts.sum() == len(x)
    assert ((counts - each).abs() < 5 * each**0.5).all()


def test_a_border_repeats_the_image_as_in_a_mirror():
    row = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(400, 1, 4, 4)
    found = Augmentation(padding=2, border="reflect")(row, (4, 4), generator())
    ways = torch.tensor([[3.0, 2, 1, 2], [2, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 3], [3, 4, 3, 2]])
    assert_close(found[:, 0, 0].unique(dim=0), ways.unique(dim=0))
    assert_close(found, found[:, :, :1].expand_as(found))


def test_images_are_varied_apart_and_colours_together():
    x = torch.stack([GRID, GRID + 100, GRID + 200], 1).expand(64, 1, 3, 6, 5).reshape(64, 3, 6, 5)
    found = Augmentation(padding=0, flip=True)(x, (4, 4), generator())
    assert_close(found[:, 1] - found[:, 0], torch.full((64, 4, 4), 100.0))
    assert len(found[:, 0].flatten(1).unique(dim=0)) > 6


def test_without_anything_to_do_images_stay():
    x = torch.rand(2, 3, 6, 5)
    assert Augmentation()(x, (6, 5), generator()) is x


def test_the_middle_is_what_is_measured_on():
    assert_close(middle(GRID[None], (2, 3)), GRID[None, :, 2:4, 1:4])
    images = torch.arange(2 * 8 * 8, dtype=torch.uint8).view(2, 1, 8, 8)
    split = Split(images, torch.tensor([0, 1]), ["a", "b"], size=(8, 8), crop=(4, 6))
    assert_close(split.inputs(slice(None)), images[:, :, 2:6, 1:7] / 255)
    varied = split.varied(torch.arange(2), Augmentation(), generator())
    assert varied.shape == (2, 1, 4, 6) and not torch.equal(varied, split.inputs(slice(None)))


def test_batches_vary_with_seed_epoch_and_number_alone():
    split = Split(torch.randint(256, (12, 3, 6, 5), dtype=torch.uint8), torch.arange(12), [])
    flips = Augmentation(padding=2, flip=True)

    def drawn(seed=0, epoch=0, start=0):
        return list(batches(split, 4, seed, epoch, start, flips))

    first, again, resumed = drawn(), drawn(), drawn(start=1)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(first[1:], resumed, strict=True))
    assert first[0][0].is_contiguous(memory_format=torch.channels_last)
    # One image in the same place of two batches is cropped in two ways.
    same = Split(split.images[:1].expand(12, 3, 6, 5), torch.zeros(12), [])
    (one, _), (other, _), _ = batches(same, 4, 0, 0, 0, flips)
    assert not torch.equal(one, other)
