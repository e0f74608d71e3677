"""The fifteen corruptions by name and severity, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bayeslayers.checks import did_you_mean
from bayeslayers.corruptions import blur, digital, noise, weather
from bayeslayers.dtypes import at_least_float32

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 28  # pixels: a shorter side has no room for the weaker blurs
_Corruption: TypeAlias = Callable[[Tensor, float, torch.Generator | None], Tensor]
# Each kind with its level at severities 1 to 5, in the unit that its function names.
_TABLE: dict[str, tuple[_Corruption, tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (noise.gaussian_noise, (0.04, 0.06, 0.08, 0.11, 0.15)),
    "shot_noise": (noise.shot_noise, (0.003, 0.006, 0.012, 0.022, 0.04)),
    "impulse_noise": (noise.impulse_noise, (0.01, 0.02, 0.04, 0.07, 0.12)),
    "defocus_blur": (blur.defocus_blur, (0.022, 0.028, 0.035, 0.043, 0.052)),
    "glass_blur": (blur.glass_blur, (0.020, 0.025, 0.031, 0.038, 0.047)),
    "motion_blur": (blur.motion_blur, (0.07, 0.10, 0.13, 0.17, 0.22)),
    "zoom_blur": (blur.zoom_blur, (0.08, 0.12, 0.17, 0.23, 0.30)),
    "snow": (weather.snow, (0.08, 0.14, 0.20, 0.27, 0.35)),
    "frost": (weather.frost, (0.30, 0.45, 0.60, 0.75, 0.95)),
    "fog": (weather.fog, (0.3, 0.55, 0.9, 1.4, 2.2)),
    "brightness": (weather.brightness, (0.08, 0.14, 0.21, 0.29, 0.38)),
    "contrast": (digital.contrast, (0.7, 0.5, 0.36, 0.25, 0.16)),
    "elastic_transform": (digital.elastic_transform, (0.016, 0.023, 0.031, 0.040, 0.050)),
    "pixelate": (digital.pixelate, (0.80, 0.65, 0.52, 0.41, 0.32)),
    "jpeg_compression": (digital.jpeg_compression, (50, 35, 24, 16, 10)),
}
KINDS = tuple(_TABLE)


def corrupt(images: Tensor, kind: str, severity: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Return images with one of 15 corruptions, at a severity from 1 to 5.

    The kinds are those of Hendrycks & Dietterich 2019 (arXiv 1903.12261): gaussian_noise, shot_noise, impulse_noise;
    defocus_blur, glass_blur, motion_blur, zoom_blur; snow, frost, fog, brightness; contrast, elastic_transform,
    pixelate, jpeg_compression. They are written from the paper's description, and their levels are our own: metrics
    are not those of the paper's data sets. Lengths are shares of the shorter side, so that an image of any size looks
    alike.

    Args:
        images: Images `(n, c, h, w)` with 1 or 3 channels, floating point in [0, 1], sides of at least 28 pixels.
        kind: Name of the corruption.
        severity: 1 to 5.
        generator: Source of noise and directions, on the device of the images; None for torch's own. The same state
            gives the same images.

    Returns:
        New images with the shape and the dtype of the others, in [0, 1].

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If shape, values, kind or severity are others.

    Example:
        >>> import torch, bayeslayers as bl
        >>> images = torch.rand(2, 3, 32, 32)
        >>> bl.corrupt(images, "fog", 3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    (kind,) = check_kinds("kind", [kind])
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}.")
    check_images(images)
    function, levels = _TABLE[kind]
    found = function(at_least_float32(images.detach()), levels[severity - 1], generator)
    return found.clamp(0, 1).to(images.dtype)


def corrupted_batches(
    batches: Iterable[tuple[Tensor, Tensor]], kind: str, severity: int, seed: int, first: int = 0, every: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (x, y) with corrupted images.

    What is drawn depends on seed, kind and number of the batch alone: every severity has the same noise, and every
    network sees the same images. They are made on the CPU, for a generator of another device draws other numbers.

    Args:
        batches: Images and labels.
        kind: As for `corrupt`.
        severity: As for `corrupt`.
        seed: Of the corruption.
        first: Number of the first batch.
        every: Batches from one to the next; the others are those of other ranks.
    """
    stream = seed * 1_000_003 + KINDS.index(kind)
    for number, (x, y) in enumerate(batches):
        own = torch.Generator().manual_seed((stream * 1_000_003 + first + every * number) % 2**63)
        yield corrupt(x.cpu(), kind, severity, generator=own).to(x.device), y


def check_kinds(name: str, kinds: Sequence[str]) -> tuple[str, ...]:
    """Return names of corruptions.

    Raises:
        TypeError: If these are no list.
        ValueError: If there is none, or one is not known or comes twice.
    """
    known = f"Known: {', '.join(KINDS)}."
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise TypeError(f"{name} must be a list of names, got {kinds!r}. {known}")
    if not kinds:
        raise ValueError(f"{name} must name at least one kind, got none. {known}")
    for kind in kinds:
        if kind not in _TABLE:
            hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
            raise ValueError(f"{name} must be kinds of corruption, got {kind!r}.{hint} {known}")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{name} must name each kind once, got {', '.join(kinds)}.")
    return tuple(kinds)


def check_images(images: object) -> None:
    """Raise unless a value is images that can be corrupted, as `corrupt` says."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {got}. Divide bytes by 255.")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < SMALLEST or len(images) == 0:
        raise ValueError(
            f"images must have the shape (n, c, h, w) with c = 1 or 3, and h, w >= {SMALLEST}, got "
            f"{tuple(images.shape)}."
        )
    low, high = map(float, images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(
            f"images must have values in [0, 1], got {low:.4g} to {high:.4g}. Divide bytes by 255, and leave "
            "normalisation to the model."
        )
