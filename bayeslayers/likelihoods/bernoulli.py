"""Binary labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslayers.likelihoods.base import mutual_information, same_shape


@dataclass(frozen=True)
class Bernoulli:
    """A binary label per element of the logits, of any shape `(n, *)`; probabilities are those of the label 1.

    Uncertainties are entropies in nats, as for `Categorical`.
    """

    name: ClassVar[str] = "bernoulli"
    discrete: ClassVar[bool] = True

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross entropy; `target` is 0 or 1 in the shape of `output`."""
        same_shape(output, target)
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        prob = output.sigmoid()
        return prob, _binary_entropy(prob)

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        return mutual_information(_binary_entropy(mean), aleatoric)


def _binary_entropy(prob: Tensor) -> Tensor:
    return torch.special.entr(prob) + torch.special.entr(1 - prob)
