"""One class of several, per example or per position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.likelihoods.base import mutual_information


@dataclass(frozen=True)
class Categorical:
    """Classes in dimension 1 of the logits: `(n, c)`, or `(n, c, *)` with a label per position.

    Uncertainties are entropies in nats, per example or position: total H(E[p]), aleatoric E[H(p)],
    epistemic their difference, the mutual information of label and weights.
    Source: Depeweg et al. 2018 (arXiv 1710.07283), Eq. 4; Houlsby et al. 2011 (arXiv 1112.5745).
    """

    name: ClassVar[str] = "categorical"
    discrete: ClassVar[bool] = True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy; `target` holds class indices, `(n,)` or `(n, *)`."""
        return F.cross_entropy(_with_classes(output), target)

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        probs = _with_classes(output).softmax(1)
        return probs, torch.special.entr(probs).sum(1)

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return mutual_information(torch.special.entr(mean).sum(1), aleatoric)


def _with_classes(output: Tensor) -> Tensor:
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(
            f"output must have two or more classes in dimension 1, got shape {tuple(output.shape)}. "
            "For one logit per example use Bernoulli()."
        )
    return output
