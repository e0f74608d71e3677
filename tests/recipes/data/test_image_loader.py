"""Pictures of files vary by seed, epoch and place alone, whoever reads them."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from support.ranks import WHAT_FORKS_SAY
from torch.testing import assert_close

from recipes.data.augmentation import Augmentation, _window_of_area
from recipes.data.image_files import ImageFiles
from recipes.data.image_loader import VariedPictures, file_batches


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [root / f"{number}.png" for number in range(7)]
    for path in paths[:-1]:
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    paths[-1].write_bytes(b"no picture")
    files = ImageFiles(paths, (3, 20, 20))
    return VariedPictures(files, torch.arange(7), Augmentation(flip=True, scale=[0.2, 1.0]), (16, 12), True)


def of(pictures, **options):
    return list(file_batches(pictures, 3, 5, 1, 0, **options))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks")
@pytest.mark.filterwarnings(WHAT_FORKS_SAY)
def test_workers_threads_parts_and_later_starts_see_the_same_pictures(pictures):
    before = torch.get_rng_state(), random.getstate()
    whole = of(pictures)
    assert [len(batch.x) for batch in whole] == [3, 3] or sum(len(batch.faults) for batch in whole) == 1
    for batch, other in zip(whole, of(pictures, workers=2), strict=True):
        assert_close(batch, other, rtol=0, atol=0)
    first, second = (of(pictures, own=own) for own in (slice(1), slice(1, 3)))
    for batch, *parts in zip(whole, first, second, strict=True):
        assert_close(torch.cat([part.x for part in parts]), batch.x, rtol=0, atol=0)
        assert_close(torch.cat([part.y for part in parts]), batch.y, rtol=0, atol=0)
        assert sorted(fault for part in parts for fault in part.faults) == sorted(batch.faults)
    (late,) = file_batches(pictures, 3, 5, 1, 1)
    assert_close(late, whole[1], rtol=0, atol=0)
    assert not torch.equal(whole[0].x, next(file_batches(pictures, 3, 5, 2, 0)).x)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_crop_of_random_area_is_torchvisions():
    """Areas and shapes have the distribution of torchvision's RandomResizedCrop."""
    from torchvision.transforms.v2 import RandomResizedCrop

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    image, theirs = torch.zeros(3, 400, 500), RandomResizedCrop(8, scale=(0.2, 0.5))
    found, expected = [], []
    for _ in range(2000):
        _, _, height, width = _window_of_area((400, 500), (0.2, 0.5), generator)
        their = theirs.make_params([image])
        found.append([height * width, width / height])
        expected.append([their["height"] * their["width"], their["width"] / their["height"]])
    one, other = torch.tensor(found), torch.tensor(expected)
    z = (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / 2000).sqrt()
    assert (z.abs() < 5).all(), z
    assert_close(one.std(0), other.std(0), rtol=0.1, atol=0.0)


def test_a_window_lies_inside_and_an_extreme_image_gets_its_middle():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        top, left, height, width = _window_of_area((30, 50), (0.08, 1.0), generator)
        assert 0 <= top <= 30 - height and 0 <= left <= 50 - width
    assert _window_of_area((10, 1000), (0.9, 1.0), generator) == (0, 493, 10, 13)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scale": [0.5, 0.2]}, "scale must be two parts of the area"),
        ({"scale": [0.0, 1.0]}, "scale must be two parts of the area"),
        ({"scale": [0.1, 1.0], "padding": 2}, "padding must be 0 beside augmentation.scale, got 2"),
    ],
)
def test_a_scale_that_breaks_a_rule_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Augmentation(**fields).check((3, 8, 8))
