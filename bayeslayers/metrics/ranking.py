"""Ranking by a score: how well it separates two kinds of examples, and how many errors confident predictions have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RiskCoverage:
    """The error rate of the predictions that are kept, at each threshold of the uncertainty.

    Source: Geifman & El-Yaniv 2017 (arXiv 1705.08500).

    Attributes:
        coverage: Share of the examples that are kept, ascending to 1, `(k,)`. Equal scores are kept together.
        risk: Error rate among the kept examples, `(k,)`.
    """

    coverage: Tensor
    risk: Tensor

    def coverage_at(self, risk: float) -> float:
        """Return the largest coverage whose risk is at most `risk`, 0 if there is none."""
        return float(self.coverage[self.risk <= risk].max()) if (self.risk <= risk).any() else 0.0


@dataclass(frozen=True)
class Levels:
    """Examples of two kinds, counted at every level of a score, in ascending order.

    Every metric that depends only on the order of the scores is a function of these counts; ties stay ties.

    Attributes:
        negatives: In-distribution or correctly predicted examples at each level, float64, `(k,)`.
        positives: Out-of-distribution or wrongly predicted ones, which should score higher, float64, `(k,)`.
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
        """Whether negatives or positives are absent, so that there is nothing to separate."""
        return not (self.negatives.any() and self.positives.any())

    def auroc(self) -> float:
        """Return the probability that a positive scores higher than a negative; NaN without one of them.

        A tie counts one half, so this is the Mann-Whitney statistic and the trapezoidal area under the ROC curve.
        """
        if self.one_kind:
            return math.nan
        below = self.negatives.cumsum(0) - self.negatives / 2
        return float((self.positives * below).sum() / (self.positives.sum() * self.negatives.sum()))

    def false_positive_rate(self, recall: float = 0.95) -> float:
        """Return the share of negatives that reach the threshold; NaN without one of the kinds.

        The threshold is the highest score that at least `recall` of the positives reach. At 0.95 it is the
        FPR95 of Hendrycks et al. 2019 (arXiv 1812.04606), whose positives are the out-of-distribution examples.
        (Liang et al. 2018, arXiv 1706.02690, fix 95 % of the in-distribution examples instead: another number.)
        """
        if self.one_kind:
            return math.nan
        found, flagged = (
            kind.flip(0).cumsum(0) / kind.sum() for kind in (self.positives, self.negatives)
        )  # from the highest score down
        return float(flagged[torch.searchsorted(found, recall)])

    def risk_coverage(self) -> RiskCoverage:
        """Return the curve of the share of positives among the lowest scores."""
        kept = (self.negatives + self.positives).cumsum(0)
        return RiskCoverage(kept / kept[-1], self.positives.cumsum(0) / kept)

    def aurc(self) -> float:
        r"""Return the area under the risk-coverage curve, the mean over i of the risk of the i lowest scores.

        Ties are averaged over their random order: the j-th of m ties with g positives among them, after
        n others with w positives, has the expected risk (w + j g / m) / (n + j), whose sum over j is

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

    A bin holds the scores that agree in exponent and the first 7 bits of the fraction. Its relative width is at
    most 1/128, and scores below 2^-27 share the first bin. Metrics of the `levels` are exact for scores rounded
    in this way.
    """

    NUM_BINS, BITS = 4096, 7
    _LOWEST = (127 - 27) << BITS  # the biased exponent of 2^-27

    def __init__(self) -> None:
        self._counts = torch.zeros(2, self.NUM_BINS, dtype=torch.int64)

    def add(self, score: Tensor, positive: Tensor) -> None:
        """Add scores >= 0 and whether each is a positive, `(m,)`."""
        # The bit patterns of floats >= 0 have the order of their values.
        index = (score.float().view(torch.int32) >> 23 - self.BITS) - self._LOWEST
        index = index.clamp(0, self.NUM_BINS - 1) + self.NUM_BINS * positive
        self._counts += torch.bincount(index, minlength=2 * self.NUM_BINS).view(2, -1).cpu()

    def levels(self) -> Levels:
        """Return the counts of the bins that are not empty."""
        return Levels(*self._counts[:, self._counts.any(0)].double())


def ood_auroc(known: Tensor, ood: Tensor) -> float:
    """Return the probability that an out-of-distribution example scores higher than an in-distribution one.

    Args:
        known: Uncertainty scores of in-distribution examples, `(n,)`.
        ood: Uncertainty scores of out-of-distribution examples, `(m,)`.

    Raises:
        ValueError: If one of them is empty or holds scores that are not finite.
    """
    return two_sets(known, ood).auroc()


def two_sets(known: Tensor, ood: Tensor) -> Levels:
    """Return the levels of the scores of in-distribution and out-of-distribution examples; see `ood_auroc`."""
    scores = torch.cat([known, ood]).double()
    if 0 in (len(known), len(ood)) or not scores.isfinite().all():
        raise ValueError(
            f"known and ood must hold finite scores, got {len(known)} and {len(ood)} scores, "
            f"{int((~scores.isfinite()).sum())} of them NaN or infinite."
        )
    return Levels.of(scores, torch.arange(len(scores), device=scores.device) >= len(known))
