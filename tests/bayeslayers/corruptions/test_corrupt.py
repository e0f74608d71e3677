from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.corruptions import (
    KINDS,
    SEVERITIES,
    blur,
    check_kinds,
    corrupted_batches,
    digital,
    fields,
    noise,
    weather,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(3, 32, 32), (1, 28, 28), (3, 40, 57)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, c, h, w):
    """Smooth colours with sharp edges and some noise, in [0.05, 0.95]."""
    x = F.interpolate(torch.rand(n, c, 5, 5, generator=generator(1)), (h, w), mode="bicubic")
    x[:, :, h // 4 : h // 2, w // 3 : 2 * w // 3] += 0.5
    return (x + 0.05 * torch.randn(x.shape, generator=generator(2))).clamp(0.05, 0.95)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_corruption_keeps_what_an_image_is_and_grows_with_its_severity(kind, size):
    x = pictures(6, *size)
    kept, state = x.clone(), torch.get_rng_state()
    found = [bl.corrupt(x, kind, severity, generator=generator()) for severity in SEVERITIES]
    again = bl.corrupt(x, kind, 3, generator=generator())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert torch.equal(again, found[2])
    for images in found:
        assert images.shape == x.shape and images.dtype == x.dtype
        assert 0 <= images.min() and images.max() <= 1
    distances = [float((images - x).abs().mean()) for images in found]
    assert 1e-3 < distances[0] and distances[-1] < 0.5
    assert distances == sorted(set(distances))
    assert all((image != one).any() for image, one in zip(found[0], x, strict=True))


def test_the_kinds_are_the_fifteen_of_the_benchmark():
    assert KINDS == (
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_random_differs_with_the_seed_and_from_image_to_image(kind):
    x = pictures(1, 3, 32, 32).expand(2, -1, -1, -1)
    first, other = (bl.corrupt(x, kind, 3, generator=generator(seed)) for seed in (0, 1))
    fixed = kind in {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert torch.equal(first, other) == fixed
    assert torch.allclose(first[0], first[1], atol=1e-6) == fixed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_stay_and_extreme_images_stay_finite(kind, dtype):
    x = torch.stack([torch.zeros(3, 28, 28), torch.ones(3, 28, 28), torch.full((3, 28, 28), 0.5)]).to(dtype)
    found = bl.corrupt(x, kind, 5, generator=generator())
    assert found.dtype == dtype and bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize(
    ("images", "kind", "severity", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "fog", 1, TypeError, "floating-point tensor.*got torch.uint8"),
        ([0.5], "fog", 1, TypeError, "got list"),
        (torch.zeros(3, 32, 32), "fog", 1, ValueError, r"shape \(n, c, h, w\).*got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), "fog", 1, ValueError, r"got \(0, 3, 32, 32\)"),
        (torch.zeros(2, 4, 32, 32), "fog", 1, ValueError, "c = 1 or 3"),
        (torch.zeros(2, 1, 27, 40), "fog", 1, ValueError, "h, w >= 28"),
        (torch.full((2, 1, 28, 28), 1.01), "fog", 1, ValueError, "values in .0, 1., got 1.01 to 1.01.*normalisation"),
        (torch.full((2, 1, 28, 28), -0.1), "fog", 1, ValueError, "got -0.1 to -0.1"),
        (torch.full((2, 1, 28, 28), math.nan), "fog", 1, ValueError, "got nan to nan"),
        (torch.zeros(2, 1, 28, 28), "frog", 1, ValueError, "got 'frog'. Did you mean 'fog'.*Known: gaussian_noise, "),
        (torch.zeros(2, 1, 28, 28), 3, 1, ValueError, "got 3. Known"),
        (torch.zeros(2, 1, 28, 28), "fog", 0, ValueError, "severity must be an integer from 1 to 5, got 0"),
        (torch.zeros(2, 1, 28, 28), "fog", True, ValueError, "got True"),
        (torch.zeros(2, 1, 28, 28), "fog", "3", ValueError, "got '3'"),
    ],
)
def test_what_cannot_be_corrupted_is_named(images, kind, severity, error, message):
    with pytest.raises(error, match=message):
        bl.corrupt(images, kind, severity)


def test_lists_of_kinds_are_checked():
    assert check_kinds("corruptions", ["snow", "fog"]) == ("snow", "fog")
    for kinds, error, message in (
        ([], ValueError, "corruptions must name at least one kind, got none. Known"),
        (["fog", "fog"], ValueError, "corruptions must name each kind once, got fog, fog"),
        ("fog", TypeError, "corruptions must be a list of names, got 'fog'"),
        (None, TypeError, "got None"),
    ):
        with pytest.raises(error, match=message):
            check_kinds("corruptions", kinds)


def test_batches_have_noise_of_their_own_which_ranks_share_out():
    x, y = pictures(2, 1, 28, 28), torch.arange(2)
    whole = list(corrupted_batches([(x, y)] * 4, "snow", 2, seed=7))
    parts = [list(corrupted_batches([(x, y)] * 2, "snow", 2, seed=7, first=rank, every=2)) for rank in (0, 1)]
    for number, (images, labels) in enumerate(whole):
        assert torch.equal(images, parts[number % 2][number // 2][0]) and torch.equal(labels, y)
        assert not torch.equal(images, whole[number - 1][0])
    (other, _), *_ = corrupted_batches([(x, y)], "snow", 2, seed=8)
    assert not torch.equal(other, whole[0][0])


def test_noise_has_the_moments_of_its_level():
    x = torch.full((8, 1, 50, 50), 0.3)
    count = x.numel()
    error = noise.gaussian_noise(x, 0.1, generator()) - x
    assert abs(float(error.mean())) < 5 * 0.1 / count**0.5
    assert abs(float(error.var()) / 0.01 - 1) < 5 * (2 / count) ** 0.5
    shot = noise.shot_noise(x, 0.02, generator())
    assert_close(shot, (shot / 0.02).round() * 0.02)
    assert abs(float(shot.mean()) - 0.3) < 5 * (0.3 * 0.02 / count) ** 0.5
    assert abs(float(shot.var()) / (0.3 * 0.02) - 1) < 5 * (2.1 / count) ** 0.5
    impulse = noise.impulse_noise(x, 0.1, generator())
    for value, share in ((0.0, 0.05), (1.0, 0.05), (0.3, 0.9)):
        found = float((impulse == torch.tensor(value)).float().mean())
        assert abs(found - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_filters_are_those_of_scipy_and_a_disc_has_its_area():
    x, kernels = pictures(2, 3, 30, 34).double(), torch.rand(2, 5, 5, generator=generator()).double()
    found = blur.filtered(x, kernels)
    for image, kernel, expected in zip(x, kernels, found, strict=True):
        for channel, own in zip(image, expected, strict=True):
            weights = (kernel / kernel.sum()).numpy()
            assert_close(own, torch.as_tensor(ndimage.correlate(channel.numpy(), weights, mode="mirror")))
    for radius in (0.7, 1.5, 4.2):
        disc = blur._disc(x, radius)
        assert float(disc.sum()) == pytest.approx(math.pi * radius**2, rel=0.1)
        assert_close(disc, disc.T)
        assert_close(disc, disc.flip(0))


def test_streaks_lie_along_their_angle():
    x = torch.zeros(3, 1, 41, 41, dtype=torch.float64)
    x[:, :, 20, 20] = 1
    found = blur.streaked(x, 10 / 41, torch.tensor([0, math.pi / 2, math.pi / 4], dtype=torch.float64))[:, 0]
    assert_close(found.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    assert_close(found[0].sum(1)[20], torch.tensor(1.0, dtype=torch.float64))
    assert_close(found[1], found[0].T)
    across = torch.arange(41.0, dtype=torch.float64) - 20
    assert float((found[0, 20] * across.square()).sum()) == pytest.approx(10**2 / 12, rel=0.15)
    assert_close(found[2], found[2].T)
    assert float(found[2].diagonal().sum()) > 0.4


def test_a_zoom_and_a_blur_leave_flat_images_and_the_centre():
    flat = torch.full((2, 3, 33, 45), 0.37)
    for function in (blur.defocus_blur, blur.glass_blur, blur.motion_blur, blur.zoom_blur, digital.elastic_transform):
        assert_close(function(flat, 0.05, generator()), flat)
    assert_close(blur.zoom_blur(pictures(2, 1, 33, 33), 0.0, None), pictures(2, 1, 33, 33), atol=1e-5, rtol=0)
    x = torch.zeros(1, 1, 31, 31)
    x[..., 15, 15] = 1
    assert float(blur.zoom_blur(x, 0.2, None)[..., 15, 15]) == pytest.approx(1, abs=1e-3)


def test_pixels_are_taken_from_where_they_are_said_to_lie():
    x = pictures(2, 3, 29, 36)
    assert_close(fields.sampled_at(x, torch.zeros(2, 2, 29, 36)), x, atol=1e-5, rtol=0)
    moved = torch.zeros(2, 2, 29, 36)
    moved[:, 0], moved[:, 1] = 3, -2
    assert_close(fields.sampled_at(x, moved)[:, :, 2:, :-3], x[:, :, :-2, 3:], atol=1e-5, rtol=0)


def test_a_fractal_goes_from_0_to_1_and_is_rougher_with_more_roughness():
    x = torch.zeros(4, 1, 48, 64)
    smooth, rough = (fields.plasma(x, roughness, generator()) for roughness in (0.3, 0.8))
    for field in (smooth, rough):
        assert field.shape == (4, 1, 48, 64)
        assert field.amin((1, 2, 3)).tolist() == [0] * 4 and field.amax((1, 2, 3)).tolist() == [1] * 4
    assert 2 * smooth.diff(dim=3).abs().mean() < rough.diff(dim=3).abs().mean()


def test_weather_whitens():
    x = torch.full((3, 3, 32, 32), 0.3)
    assert (weather.snow(x, 0.3, generator()) >= x).all() and (weather.frost(x, 0.9, generator()) >= x - 1e-6).all()
    red, _, blue = weather.frost(x, 0.9, generator()).mean((0, 2, 3)).tolist()
    assert blue > red + 0.01
    thick = weather.fog(x, 2.0, generator())
    assert_close(3 * thick - x, (3 * thick - x)[:, :1].expand_as(x))  # 2 plasma, the same in each channel
    assert float((3 * thick - x).max()) == pytest.approx(2, abs=1e-5)


def test_brightness_changes_the_value_alone():
    x = pictures(1, 3, 28, 28)
    x[..., 0, 0] = 0
    found = weather.brightness(x, 0.2, None)
    for before, after in zip(x[0].flatten(1).T.tolist(), found[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1)), abs=1e-5)


def test_contrast_keeps_means_and_scales_deviations():
    x = pictures(2, 3, 28, 30)
    found = digital.contrast(x, 0.25, None)
    assert_close(found.mean((2, 3)), x.mean((2, 3)))
    assert_close(found.std((2, 3)), 0.25 * x.std((2, 3)))


def test_large_pixels_are_means_of_their_cells():
    x = torch.rand(1, 1, 30, 40, generator=generator())
    found = digital.pixelate(x, 0.5, None)
    assert_close(found, F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3))
    steps = digital.pixelate(x, 0.3, None)[0, 0].diff(dim=1).abs() > 1e-5
    assert steps.sum(1).tolist() == [11] * 30  # 12 cells


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(channels):
    x = pictures(2, channels, 28, 44)
    found = digital.jpeg_compression(x, 40, None)
    for image, expected in zip(x, found, strict=True):
        pixels = np.uint8((255 * image).round().permute(1, 2, 0).numpy())
        stream = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, "JPEG", quality=40)
        read = np.asarray(Image.open(stream)).reshape(pixels.shape)
        assert_close(expected, torch.as_tensor(read.copy()).permute(2, 0, 1) / 255)
    assert float((digital.jpeg_compression(x, 95, None) - x).abs().mean()) < 0.05
