"""What every likelihood does, and what several of them share."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor


class Likelihood(Protocol):
    """p(target | output of the network)."""

    name: ClassVar[str]
    discrete: ClassVar[bool]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean negative log-likelihood over the batch, in nats."""
        ...

    def per_draw(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictive mean and the aleatoric uncertainty under one sample of the weights."""
        ...

    def split(self, mean: Tensor, variance: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total and the epistemic uncertainty from averages over posterior samples.

        Args:
            mean: Mean over samples of the predictive mean.
            variance: Variance over samples of the predictive mean.
            aleatoric: Mean over samples of the aleatoric uncertainty.
        """
        ...


def same_shape(output: Tensor, target: Tensor) -> None:
    """Raise ValueError unless a target has the shape of the output, so that nothing is broadcast."""
    if output.shape != target.shape:
        advice = " target.unsqueeze(-1) has it." if output.shape == (*target.shape, 1) else ""
        raise ValueError(f"target must have the shape {tuple(output.shape)}, got {tuple(target.shape)}.{advice}")


def mutual_information(total: Tensor, aleatoric: Tensor) -> tuple[Tensor, Tensor]:
    """Return the total entropy and the mutual information of label and weights."""
    # The difference is non-negative by Jensen's inequality; only rounding can make it negative.
    return total, (total - aleatoric).clamp_min(0)
