"""Calibration: whether events predicted with probability p occur with frequency p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: confidence and accuracy in bins of the confidence.

    Attributes:
        edges: Edges of the b bins, `(b + 1,)`; a bin includes its lower edge, and the last one also 1.
        confidence: Mean confidence in each bin, `(b,)`; NaN in an empty bin.
        accuracy: Share of correct predictions in each bin, `(b,)`; NaN in an empty bin.
        count: Predictions in each bin, `(b,)`.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


class CalibrationBins:
    """Running sums in equal bins of [0, 1], for one or several sets of probabilities.

    Args:
        num_sets: Sets that are binned separately: one for the confidence, c for the probabilities of c classes.
        num_bins: Bins of each.

    Attributes:
        edges: Edges of the bins, `(num_bins + 1,)`.
        sums: Counts, sums of the probabilities and of the hits in each bin, `(3, num_sets, num_bins)`.
    """

    def __init__(self, num_sets: int = 1, num_bins: int = NUM_BINS):
        self.edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
        self.sums = torch.zeros(3, num_sets, num_bins, dtype=torch.float64)

    def add(self, probs: Tensor, hits: Tensor) -> None:
        """Add m predictions.

        Args:
            probs: Predicted probabilities, float64, `(m, num_sets)`.
            hits: Whether the predicted event occurred, `(m, num_sets)`.
        """
        _, num_sets, num_bins = self.sums.shape
        index = torch.bucketize(probs, self.edges.to(probs.device), right=True) - 1
        # A probability of 1 belongs to the last bin. An average over samples can exceed 1 by rounding.
        index = index.clamp_max(num_bins - 1) + num_bins * torch.arange(num_sets, device=probs.device)
        for total, values in zip(self.sums, (torch.ones_like(probs), probs, hits.to(probs.dtype)), strict=True):
            sums = probs.new_zeros(num_sets * num_bins).index_add_(0, index.flatten(), values.flatten())
            total += sums.view(num_sets, num_bins).cpu()

    def errors(self) -> Tensor:
        """Return the expected calibration error of each set, `(num_sets,)`.

            sum over bins of count / n abs(accuracy - confidence)

        Source: Guo et al. 2017 (arXiv 1706.04599), Eq. 3, of the confidence; Kull et al. 2019
        (arXiv 1910.12656), of the probabilities of each class, whose mean is the classwise error.
        """
        count, probs, hits = self.sums
        return (hits - probs).abs().sum(1) / count.sum(1)

    def reliability(self) -> Reliability:
        """Return the reliability diagram of the first set."""
        count, probs, hits = self.sums[:, 0]
        return Reliability(self.edges, probs / count, hits / count, count.long())


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> float:
    """Return the calibration error of the confidence in bins with equal numbers of examples.

        sum over bins of count / n abs(accuracy - confidence)

    The bins' sizes differ by at most one. Equal confidences may fall into two bins; each example then counts
    with the mean accuracy of its ties, so that the order of the examples does not matter.
    Source: Nixon et al. 2019 (arXiv 1904.01685); here for the predicted class alone.

    Args:
        confidence: Probabilities of the predicted classes, `(n,)`.
        correct: Whether they are correct, `(n,)`.
        num_bins: Bins.
    """
    levels, index, count = torch.unique(confidence.double(), return_inverse=True, return_counts=True)
    accuracy = torch.zeros_like(levels).index_add_(0, index, correct.double()) / count
    gaps = (accuracy - levels).repeat_interleave(count)  # ascending in the confidence
    return float(sum(part.sum().abs() for part in gaps.tensor_split(num_bins)) / len(gaps))
