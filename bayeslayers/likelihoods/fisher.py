"""The Fisher information of a likelihood in the output of the network, in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayeslayers.likelihoods.base import Likelihood
from bayeslayers.likelihoods.bernoulli import Bernoulli
from bayeslayers.likelihoods.categorical import Categorical
from bayeslayers.likelihoods.gaussian import Gaussian


def fisher_columns(likelihood: Likelihood, output: Tensor) -> Iterator[Tensor]:
    """Yield columns v_1, v_2, ... of a root of each example's Fisher information in its output, `(n, c)` each.

        sum_k v_k v_k^T = E[grad log p(y | f) grad log p(y | f)^T],  y ~ p(y | f)

    Gradients that start from v_k instead of the loss's give, squared and added over k, the Fisher information in the
    weights, which is the loss's Gauss-Newton matrix. An example counts as one observation: under `Bernoulli` its labels
    are averaged, as in its loss.

    Args:
        likelihood: `Categorical` without class weights, `Bernoulli`, or `Gaussian`.
        output: Output of the network, `(n, c)`.

    Raises:
        TypeError: If the likelihood is of another kind.
        ValueError: If the output has positions, or the likelihood weights classes.
    """
    if output.dim() != 2:
        raise ValueError(
            f"output must be of shape (n, c) under fisher='exact', got {tuple(output.shape)}. Use fisher='sampled'."
        )
    output = output.detach()
    if isinstance(likelihood, Categorical):
        if likelihood.class_weights is not None:
            raise ValueError("class_weights must be None under fisher='exact', got weights. Use fisher='empirical'.")
        probs = likelihood.per_draw(output)[0]
        for k in range(probs.shape[1]):  # diag(p) - p p^T = sum_k p_k (e_k - p) (e_k - p)^T
            unit = torch.zeros_like(probs).index_fill_(1, torch.tensor(k, device=probs.device), 1.0)
            yield probs[:, k : k + 1].sqrt() * (unit - probs)
        return
    if isinstance(likelihood, Bernoulli):
        prob = output.sigmoid()
        information = prob * (1 - prob) / output.shape[1]
    elif isinstance(likelihood, Gaussian):
        mean, variance = likelihood.per_draw(output)
        information = 1 / variance
        if likelihood.variance is None:  # the second half of the output is the log variance
            information = torch.cat([information, torch.full_like(mean, 0.5)], 1)
    else:
        kind = type(likelihood).__name__
        raise TypeError(f"likelihood must be Categorical, Bernoulli or Gaussian, got {kind}. Use fisher='empirical'.")
    for k in range(output.shape[1]):
        column = torch.zeros_like(output)
        column[:, k] = information[:, k].sqrt()
        yield column
