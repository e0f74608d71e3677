"""K-FAC and Noisy K-FAC: natural gradients and matrix-variate posteriors from Kronecker factors of the Fisher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from bayeslayers.convert.selection import Selectors
from bayeslayers.likelihoods import Likelihood
from bayeslayers.optim.fisher import Fisher, Schedule
from bayeslayers.optim.kronecker import KroneckerFactored
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import Sync


class NoisyKFAC(KroneckerFactored):
    """Natural-gradient variational inference with a matrix-variate Gaussian posterior for each layer.

        W ~ N(M, 1/ess A_in^-1 (x) G_in^-1)
        M <- M - lr G_ex^-1 (g_bar + prior_precision / ess (M - prior_mean)) A_ex^-1

    for the matrix W = [weight | bias] of a linear layer or a convolution, ess = N/T. A and G are
    moving averages of the Kronecker factors of the Fisher at drawn weights (`curvature.kronecker`),
    A_in and G_in the two with the damping prior_precision / ess between them (`matrix_gaussian.damp`),
    which makes them the posterior's; A_ex and G_ex those with `damping` besides.

    Other Bayesian tensors (norms, embeddings, transposed and grouped convolutions, the bias of a
    frozen weight) have diagonal posteriors, moved as `VOGN` does with `factor_lr` for its
    `precision_lr`. Parameters of layers that are not Bayesian are trained by Adam.

    The layers hold roots of the covariance (`BayesianLayer`), from which draws of any kind are made
    but those of outputs; their precisions, one over the variance of each entry, are what `merge`,
    `kl_divergence`, `posterior_to_prior` and plots read. A prior precision that differs within a
    layer's matrix counts by its mean in the covariance, and entry by entry in the step.

    Source: Zhang et al. 2018 (arXiv 1712.02390), Algorithm 2, with the prior's gradient at the mean;
    Martens & Grosse 2015 (arXiv 1503.05671); Grosse & Martens 2016 (arXiv 1602.01407).

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        lr: Step size of the mean, in units of the posterior's natural gradient.
        beta1: Momentum, the weight of the past in the average of gradients, in [0, 1).
        factor_lr: Weight of the new factors in their moving averages, in (0, 1].
        damping: Added to the curvature in the mean's step, >= 0. With much less, the first steps of wide networks
            diverge: gradients are those at drawn weights.
        prior_precision: Precision of the prior for every Bayesian tensor; None keeps the layers'.
        init_precision: Precision of the posterior at the start; None keeps the layers' posterior, so that
            a loaded one is trained further. What it is above the prior's is added to the curvature, as
            a multiple of I for a matrix, and fades by 1 - factor_lr with each update. "curvature" leaves it
            out; the first draws of a network that has learned nothing can then be far from its mean.
        temperature: T of the tempered posterior; the likelihood counts N/T times. T < 1 sharpens.
        update_every: Steps from one update of the factors to the next, but a tenth of the steps so far at most.
        inverse_every: Steps from one computation of inverses and roots to the next, likewise; or a function of the
            number of the step that returns them.
        inverse_tolerance: By how much of itself an eigenvalue of the step's inverses, and of the factors of the
            posterior's covariance, may be too large. They leave out eigenvalues that damping and noise hide, where that
            is cheaper (`distributions.low_rank`); 0 computes them whole. The layers' roots are those of the draws.
        fisher: "sampled" takes the factors at labels that the model's own likelihood draws, by a second
            backward pass: the Fisher proper, which is the loss's Gauss-Newton curvature. "empirical"
            takes them at the data's labels, from the user's backward pass.
        likelihood: What draws the labels; None for `model.likelihood`, else `Categorical()`. The loss
            should be its `loss`.
        num_samples: Draws per `step(closure)`.
        generator: Source of weights and labels, on the model's device; torch's default one if None.
        groups: Parameter groups with hyperparameters of their own, each a dict of `params` and any of
            lr, beta1, factor_lr, temperature, damping, prior_precision.
        deterministic_lr: Learning rate of parameters that are not Bayesian; None for `lr`.
        sync: Average over the ranks of torch.distributed's default group before each step; "bfloat16" sends numbers
            of that type.
        num_mc_groups: Sample groups: ranks of a group share their draws, groups have their own. One process runs
            them all, each on its part of the batch, `optimizer.part(len(x))`.
        elements_per_example: Elements that an example's loss is a mean over, for fisher="empirical"; see `VOGN`.
        dense: Linear layers and convolutions of up to 6,000 weights that get one dense curvature of all their entries,
            and a posterior N(m, (ess H + P0)^-1) of weight and bias together, in place of the factors; selectors as of
            `to_bayesian`, such as "head" or `bl.last_layer`.

    The loss is a mean over the batch's examples. Under `torch.compile` use `fisher="empirical"`.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.
        TypeError: If labels cannot be drawn from the likelihood.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = bl.BayesLinear(2, 3)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> optimizer = bl.NoisyKFAC(net, dataset_size=8)
        >>> with optimizer.sampled():
        ...     torch.nn.functional.cross_entropy(net(x), y).backward()
        >>> optimizer.step()
        >>> [tuple(root.shape) for root in net.roots]
        [(3, 3), (3, 3)]
    """

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float = 0.1,
        beta1: float = 0.9,
        factor_lr: float = 0.05,
        damping: float = 0.01,
        prior_precision: float | None = None,
        init_precision: float | Literal["curvature"] | None = None,
        temperature: float = 1.0,
        update_every: int = 10,
        inverse_every: int | Schedule = 100,
        inverse_tolerance: float = 0.5,
        fisher: Fisher = "sampled",
        likelihood: Likelihood | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        sync: Sync = False,
        elements_per_example: float | None = None,
        num_mc_groups: int = 1,
        dense: Selectors | None = None,
    ):
        arguments = locals()
        super().__init__(
            model,
            dataset_size,
            arguments,
            Options.among(arguments),
            update_every=update_every,
            inverse_every=inverse_every,
            inverse_tolerance=inverse_tolerance,
            fisher=fisher,
            likelihood=likelihood,
            dense=dense,
        )


class KFAC(KroneckerFactored):
    """Natural gradient descent with Kronecker factors: `NoisyKFAC` without draws, gradient and factors at the mean.

    The matrix-variate posterior that it leaves beside the mean is that of an online Kronecker-factored
    Laplace approximation, so `predict` draws from it as from any posterior; `method="mean"` is the
    point estimate. It knows nothing of how far draws may go: under a weak prior they can be useless
    where the mean is good.

    Source: Martens & Grosse 2015 (arXiv 1503.05671); Grosse & Martens 2016 (arXiv 1602.01407), without
    the rescaling of the step by a quadratic model; Ritter et al. 2018 (ICLR, "A Scalable Laplace
    Approximation for Neural Networks") for the posterior.

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        lr: Step size of the mean; this and the following as for `NoisyKFAC`.
        beta1: Momentum.
        factor_lr: Weight of the new factors.
        damping: Added to the curvature in the mean's step.
        prior_precision: Precision of the prior, N/T times weight decay.
        temperature: T of the tempered posterior.
        update_every: Steps between updates of the factors.
        inverse_every: Steps between inverses, or a function of the number of the step.
        inverse_tolerance: By how much of itself an eigenvalue of the step's inverses may be too large; roots are whole.
        fisher: "sampled" or "empirical".
        likelihood: What draws the labels.
        generator: Source of the labels.
        groups: Parameter groups with hyperparameters of their own.
        deterministic_lr: Learning rate of parameters that are not Bayesian.
        sync: Average over ranks before each step.
        elements_per_example: Elements that an example's loss is a mean over.
        dense: Layers with a dense curvature.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.
        TypeError: If labels cannot be drawn from the likelihood.
    """

    _sampling_counterpart = "NoisyKFAC"

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float = 0.1,
        beta1: float = 0.9,
        factor_lr: float = 0.05,
        damping: float = 0.03,
        prior_precision: float | None = None,
        temperature: float = 1.0,
        update_every: int = 10,
        inverse_every: int | Schedule = 100,
        inverse_tolerance: float = 0.3,
        fisher: Fisher = "sampled",
        likelihood: Likelihood | None = None,
        generator: torch.Generator | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        sync: Sync = False,
        elements_per_example: float | None = None,
        dense: Selectors | None = None,
    ):
        arguments = locals()
        super().__init__(
            model,
            dataset_size,
            arguments,
            Options.among(arguments, init_precision="curvature"),
            update_every=update_every,
            inverse_every=inverse_every,
            inverse_tolerance=inverse_tolerance,
            fisher=fisher,
            likelihood=likelihood,
            dense=dense,
        )
