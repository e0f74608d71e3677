"""One class of several, per example or per position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.likelihoods.base import mutual_information

_NEVER = -100  # torch's default, which no label of a class is


@dataclass(frozen=True)
class Categorical:
    """Classes in dimension 1 of the logits: `(n, c)`, or `(n, c, *)` with a label per position.

    Uncertainties are entropies in nats, per example or position: total H(E[p]), aleatoric E[H(p)],
    epistemic their difference, the mutual information of label and weights.
    Source: Depeweg et al. 2018 (arXiv 1710.07283), Eq. 4; Houlsby et al. 2011 (arXiv 1112.5745).

    Args:
        ignore_index: Label that the loss and `bl.evaluate` leave out, such as that of pixels without a class.
        class_weights: Weight of each class in the loss, > 0; the mean is over the sum of the weights. They make the
            loss another than the negative log-likelihood: rare classes are found more often, and predicted with
            more than their probability.

    Raises:
        ValueError: If a weight is not finite and > 0, or `ignore_index` is not an integer.
    """

    ignore_index: int | None = None
    class_weights: Sequence[float] | None = None
    name: ClassVar[str] = "categorical"
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ignore_index is not None and type(self.ignore_index) is not int:
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}.")
        if self.class_weights is None:
            return
        weights = self.class_weights
        if not isinstance(weights, Sequence) or len(weights) < 2 or not all(map(_is_weight, weights)):
            raise ValueError(f"class_weights must be numbers > 0, one for each class, got {weights!r:.200}.")
        object.__setattr__(self, "class_weights", tuple(map(float, weights)))  # to compare and hash

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy, 0 where no label counts; `target` holds class indices, `(n,)` or `(n, *)`.

        Raises:
            ValueError: If there are not as many classes as class weights.
        """
        output = _with_classes(output)
        if self.ignore_index is None and self.class_weights is None:
            return F.cross_entropy(output, target)
        if self.ignore_index is not None and bool((target == self.ignore_index).all()):
            return output.sum() * 0.0  # the mean of nothing would be NaN
        weight = None if self.class_weights is None else output.new_tensor(self.class_weights)
        if weight is not None and len(weight) != output.shape[1]:
            raise ValueError(
                f"output must have a class for each of the {len(weight)} class_weights, got {output.shape[1]}."
            )
        ignored = _NEVER if self.ignore_index is None else self.ignore_index
        return F.cross_entropy(output, target, weight=weight, ignore_index=ignored)

    def weight(self, target: Tensor) -> float:
        """Return what the loss of these labels is divided by: how many count, each by the weight of its class."""
        counted = target if self.ignore_index is None else target[target != self.ignore_index]
        if self.class_weights is None:
            return float(counted.numel())
        return float(torch.tensor(self.class_weights, device=target.device)[counted].sum())

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        probs = _with_classes(output).softmax(1)
        return probs, _entropy(probs)

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return mutual_information(_entropy(mean), aleatoric)


def _entropy(probs: Tensor) -> Tensor:
    """Return the entropy over classes, in half the time of `torch.special.entr`, whose logarithm is not vectorised."""
    logs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()  # 0 log 0 is 0
    return logs.mul_(probs).sum(1).abs()  # a sum of terms <= 0, so that no entropy is -0


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _with_classes(output: Tensor) -> Tensor:
    if output.dim() < 2 or output.shape[1] < 2:
        raise ValueError(
            f"output must have two or more classes in dimension 1, got shape {tuple(output.shape)}. "
            "For one logit per example use Bernoulli()."
        )
    return output
