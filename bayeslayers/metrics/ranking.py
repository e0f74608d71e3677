"""Ranking by a score: whether it tells two kinds apart, and how few errors are left among the most certain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RiskCoverage:
    """How many of the predictions that are kept are wrong, at each threshold of the uncertainty.

    Source: Geifman & El-Yaniv 2017 (arXiv 1705.08500).

    Attributes:
        coverage: Share of the examples that are kept, ascending to 1, `(k,)`. Equal scores are kept together.
        risk: Share of the kept ones that is wrong, `(k,)`.
    """

    coverage: Tensor
    risk: Tensor

    def coverage_at(self, risk: float) -> float:
        """Return the largest coverage whose risk is at most `risk`, 0 if there is none."""
        return float(self.coverage[self.risk <= risk].max()) if (self.risk <= risk).any() else 0.0


@dataclass(frozen=True)
class Levels:
    """Examples of two kinds, counted at every level of a score, in ascending order.

    Whatever depends on their order alone is a function of these counts, with ties as ties.

    Attributes:
        negatives: Known or right examples at each level, float64, `(k,)`.
        positives: Strange or wrong ones, which should score higher, float64, `(k,)`.
    """

    negatives: Tensor
    positives: Tensor

    @classmethod
    def of(cls, score: Tensor, positive: Tensor) -> Levels:
        """Return the levels of finite scores.

        Args:
            score: `(n,)`.
            positive: Whether each is a positive, `(n,)`.
        """
        levels, index = torch.unique(score, return_inverse=True)
        counts = torch.bincount(index + len(levels) * positive.long(), minlength=2 * len(levels))
        return cls(*counts.double().view(2, -1).cpu())

    @property
    def one_kind(self) -> bool:
        """Whether negatives or positives are absent, so that there is nothing to tell apart."""
        return not (self.negatives.any() and self.positives.any())

    def auroc(self) -> float:
        """Return the probability that a positive scores higher than a negative; NaN without one of them.

        A tie counts one half: the Mann-Whitney statistic, the area under the ROC curve by trapezoids.
        """
        if self.one_kind:
            return math.nan
        below = self.negatives.cumsum(0) - self.negatives / 2
        return float((self.positives * below).sum() / (self.positives.sum() * self.negatives.sum()))

    def false_positive_rate(self, recall: float = 0.95) -> float:
        """Return the share of negatives that score as high as the threshold; NaN without one of the kinds.

        The threshold is the highest score that at least `recall` of the positives reach. At 0.95 it is
        the FPR95 of Hendrycks et al. 2019 (arXiv 1812.04606), whose positives are the strangers. (Liang et al.
        2018, arXiv 1706.02690, find 95 % of the known examples instead: another number.)
        """
        if self.one_kind:
            return math.nan
        found, flagged = (
            kind.flip(0).cumsum(0) / kind.sum() for kind in (self.positives, self.negatives)
        )  # from the highest score down
        return float(flagged[torch.searchsorted(found, recall)])

    def risk_coverage(self) -> RiskCoverage:
        """Return the share of positives among the lowest scores, at each level."""
        kept = (self.negatives + self.positives).cumsum(0)
        return RiskCoverage(kept / kept[-1], self.positives.cumsum(0) / kept)

    def aurc(self) -> float:
        r"""Return the area under the risk-coverage curve, the mean over i of the risk of the i lowest scores.

        Ties come in random order, in expectation: the j-th of m ties with g positives among them, after
        n others with w positives, has the risk (w + j g / m) / (n + j), whose sum over j is

            g + (w - n g / m) (digamma(n + m + 1) - digamma(n + 1)).

        Source: Geifman et al. 2019 (arXiv 1805.08206).
        """
        ties = self.negatives + self.positives
        kept = ties.cumsum(0)
        before, wrong_before = kept - ties, self.positives.cumsum(0) - self.positives
        harmonic = torch.special.digamma(kept + 1) - torch.special.digamma(before + 1)
        risks = self.positives + (wrong_before - before * self.positives / ties) * harmonic
        return float(risks.sum() / kept[-1])


class ScoreHistogram:
    """Running counts of two kinds in 4096 bins of a score from 0 to 32.

    A bin holds the scores that agree in exponent and the first 7 bits of the fraction: it is at most 1/128 as
    wide as its scores are large, and scores below 2^-27 share the first. What follows from the `levels` is
    exact for scores that were rounded so.
    """

    NUM_BINS, BITS = 4096, 7
    _LOWEST = (127 - 27) << BITS  # the biased exponent of 2^-27

    def __init__(self) -> None:
        self._counts = torch.zeros(2, self.NUM_BINS, dtype=torch.int64)

    def add(self, score: Tensor, positive: Tensor) -> None:
        """Add scores >= 0 and whether each is a positive, `(m,)`."""
        # The bits of floats >= 0 are ordered as their values.
        index = (score.float().view(torch.int32) >> 23 - self.BITS) - self._LOWEST
        index = index.clamp(0, self.NUM_BINS - 1) + self.NUM_BINS * positive
        self._counts += torch.bincount(index, minlength=2 * self.NUM_BINS).view(2, -1).cpu()

    def levels(self) -> Levels:
        """Return the counts of the bins that are not empty."""
        return Levels(*self._counts[:, self._counts.any(0)].double())


def ood_auroc(known: Tensor, strange: Tensor) -> float:
    """Return the probability that an out-of-distribution example scores higher than a known one.

    Args:
        known: Uncertainty scores of in-distribution examples, `(n,)`.
        strange: Uncertainty scores of out-of-distribution examples, `(m,)`.

    Raises:
        ValueError: If one of them is empty or holds scores that are not finite.
    """
    return two_sets(known, strange).auroc()


def two_sets(known: Tensor, strange: Tensor) -> Levels:
    """Return the levels of the scores of known examples and strangers; see `ood_auroc`."""
    scores = torch.cat([known, strange]).double()
    if 0 in (len(known), len(strange)) or not scores.isfinite().all():
        raise ValueError(
            f"known and strange must hold finite scores, got {len(known)} and {len(strange)} scores, "
            f"{int((~scores.isfinite()).sum())} of them NaN or infinite."
        )
    return Levels.of(scores, torch.arange(len(scores), device=scores.device) >= len(known))
