"""Prediction of large images window by window, so that memory holds the activations of one window."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslayers.checks import at_least_one, fraction
from bayeslayers.likelihoods import likelihood_of


class SlidingWindow(nn.Module):
    """A network with an output for each pixel, for images of any size, of which it sees one window at a time.

    An image is resized, with its proportions, to the smallest size that covers a window. Windows lie over it at equal
    distances, and their outputs are averaged with weights that fall linearly towards the edges of each. The
    average is resized to the size of the image. A posterior sample is one network for all windows.

    Args:
        network: The network, from `(n, c, h, w)` to `(n, k, h, w)`.
        window: Height and width of its inputs.
        overlap: Least share of a window that overlaps the next one, in [0, 1).
        resize: Resize images first. Otherwise they keep their scale, and smaller ones than a window are one window.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch, bayeslayers as bl
        >>> network = bl.BayesConv2d(3, 5, 3, padding=1)
        >>> bl.predict(bl.SlidingWindow(network, (32, 48)), torch.rand(1, 3, 90, 200), num_samples=4).probs.shape
        torch.Size([1, 5, 90, 200])
    """

    def __init__(self, network: nn.Module, window: Sequence[int], overlap: float = 0.25, resize: bool = True):
        super().__init__()
        if len(window) != 2:
            raise ValueError(f"window must be a height and a width, got {list(window)}.")
        self.network, self.resize = network, resize
        self.window = at_least_one("window", window[0]), at_least_one("window", window[1])
        self.overlap = fraction("overlap", overlap)
        self.likelihood = likelihood_of(network)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        scale = max(side / extent for side, extent in zip(self.window, size, strict=True)) if self.resize else 1.0
        inner = [max(1, round(extent * scale)) for extent in size]
        output = self._windows(x if inner == list(size) else _resized(x, inner))
        return output if output.shape[-2:] == size else _resized(output, size, antialias=False)

    def _windows(self, x: Tensor) -> Tensor:
        """Return the averaged outputs of all windows over images, at the images' size."""
        spans = [_spans(extent, side, self.overlap) for extent, side in zip(x.shape[-2:], self.window, strict=True)]
        if all(len(span) == 1 for span in spans):
            return self.network(x)
        total = weights = None
        for rows in spans[0]:
            for columns in spans[1]:
                output = self.network(x[..., rows, columns])
                weight = torch.outer(*(_hat(side).to(output) for side in output.shape[-2:]))
                if total is None or weights is None:
                    total, weights = output.new_zeros(*output.shape[:2], *x.shape[-2:]), output.new_zeros(x.shape[-2:])
                # Out of place, for `torch.func.vmap` to run over samples.
                place = (columns.start, x.shape[-1] - columns.stop, rows.start, x.shape[-2] - rows.stop)
                total = total + F.pad(output * weight, place)
                weights = weights + F.pad(weight, place)
        assert total is not None and weights is not None
        return total / weights


def _spans(extent: int, side: int, overlap: float) -> list[slice]:
    """Return windows of `side` that cover `extent` at equal distances, each overlapping the next by a share or more.

    >>> _spans(10, 4, 0.5)
    [slice(0, 4, None), slice(2, 6, None), slice(4, 8, None), slice(6, 10, None)]
    >>> _spans(3, 4, 0.5)
    [slice(0, 3, None)]
    """
    if extent <= side:
        return [slice(0, extent)]
    gaps = math.ceil((extent - side) / max(1, int(side * (1 - overlap))))
    starts = [round(number * (extent - side) / gaps) for number in range(gaps + 1)]
    return [slice(start, start + side) for start in starts]


def _hat(side: int) -> Tensor:
    """Return weights that fall linearly from the middle to the edges, > 0, symmetric.

    >>> _hat(5).tolist()
    [1.0, 2.0, 3.0, 2.0, 1.0]
    """
    place = torch.arange(1, side + 1)
    return torch.minimum(place, side + 1 - place).float()


def _resized(x: Tensor, size: Sequence[int], antialias: bool = True) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", antialias=antialias)
