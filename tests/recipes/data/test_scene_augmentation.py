from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from recipes.data.augmentation import SceneAugmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(height=20, width=30):
    """An image whose channels are the labels, so that what happens to one can be read from the other."""
    labels = torch.randint(0, 5, (height // 5, width // 5), generator=generator()).repeat_interleave(5, 0)
    labels = labels.repeat_interleave(5, 1).byte()
    return (50 * labels).expand(3, -1, -1).contiguous(), labels


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_of_the_same_scale_shows_the_pixels_of_its_labels(flip):
    image, labels = scene()
    x, y = SceneAugmentation(flip=flip)(image, labels, (8, 12), generator(3))
    assert x.shape == (3, 8, 12) and y.shape == (8, 12) and y.dtype == torch.uint8
    assert_close((x[0] * 255 / 50).round().byte(), y, rtol=0, atol=0)


def test_the_whole_image_is_its_own_crop_and_half_of_them_are_mirrored():
    image, labels = scene()
    found = [SceneAugmentation(flip=True)(image, labels, (20, 30), generator(seed))[1] for seed in range(60)]
    mirrored = sum(torch.equal(y, labels.flip(1)) for y in found)
    assert mirrored + sum(torch.equal(y, labels) for y in found) == 60 and 15 < mirrored < 45


@pytest.mark.parametrize(("factor", "share"), [(2.0, 0.5), (0.5, 1.0)])
def test_a_scaled_crop_covers_that_part_of_the_image(factor, share):
    ramp = torch.arange(40).repeat(40, 1)
    image = (6 * ramp).byte().expand(3, -1, -1)
    x, y = SceneAugmentation(scale=[factor, factor])(image, ramp.byte(), (20, 20), generator(1))
    extent = 20 / factor
    assert extent * 0.8 < int(y.max()) - int(y.min()) + 1 <= extent * 1.01
    assert_close(x[0] * 255 / 6, y.float(), rtol=0, atol=1.0)  # interpolated beside the nearest


def test_a_scale_at_which_the_crop_exceeds_the_image_is_raised():
    image, labels = scene()
    x, y = SceneAugmentation(scale=[0.1, 0.1])(image, labels, (10, 10), generator())
    assert x.shape == (3, 10, 10) and set(y.unique().tolist()) <= set(labels.unique().tolist())
    small, _ = SceneAugmentation()(image[:, :6, :6], labels[:6, :6], (12, 12), generator())
    assert small.shape == (3, 12, 12)


def test_scales_are_spread_evenly_in_their_logarithm():
    ramp = torch.arange(250).repeat(250, 1).byte()
    spans = []
    for seed in range(200):
        _, y = SceneAugmentation(scale=[0.5, 2.0])(ramp.expand(3, -1, -1), ramp, (50, 50), generator(seed))
        spans.append(50 / (int(y.max()) - int(y.min()) + 1))
    logs = torch.tensor(spans).log2()
    assert -1.1 < float(logs.min()) < -0.9 and 0.9 < float(logs.max()) < 1.1
    assert abs(float(logs.mean())) < 5 * (2 / 12**0.5) / 200**0.5


def test_brightness_moves_the_mean_and_contrast_the_deviations():
    image = torch.randint(100, 156, (3, 16, 16), generator=generator(), dtype=torch.uint8)
    labels = torch.zeros(16, 16, dtype=torch.uint8)
    plain = image / 255
    means, spreads = [], []
    for seed in range(100):
        x, _ = SceneAugmentation(brightness=0.3, contrast=0.5)(image, labels, (16, 16), generator(seed))
        means.append(float(x.mean() / plain.mean()))
        spreads.append(float(x.std() / plain.std()))
    assert 0.7 <= min(means) < 0.75 and 1.25 < max(means) <= 1.3001
    assert 0.5 <= min(spreads) < 0.55 and 1.45 < max(spreads) <= 1.5001


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": [0, 4]}, "augmentation.crop must be a height and a width >= 1"),
        ({"crop": [4]}, "augmentation.crop must be a height and a width >= 1"),
        ({"scale": [1.0]}, "augmentation.scale must be the smallest and the largest factor"),
        ({"scale": [2.0, 1.0]}, "augmentation.scale must be the smallest and the largest factor"),
        ({"scale": [0.0, 1.0]}, "augmentation.scale must be the smallest and the largest factor"),
        ({"brightness": 1.0}, r"augmentation.brightness must be in \[0, 1\)"),
        ({"contrast": -0.1}, r"augmentation.contrast must be in \[0, 1\)"),
    ],
)
def test_a_rule_that_is_broken_is_named(fields, message):
    SceneAugmentation([4, 4], [0.5, 2.0], True, 0.2, 0.2).check()
    with pytest.raises(ValueError, match=message):
        SceneAugmentation(**fields).check()
