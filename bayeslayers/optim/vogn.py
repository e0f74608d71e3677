"""VOGN, the variational online Gauss-Newton method, and OGN, the same without draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from bayeslayers.checks import radius
from bayeslayers.curvature.counts import Reduction
from bayeslayers.optim.defaults import (
    ADAM_LR,
    LARGEST_MOVE,
    PRECISION_LR,
    fill_untrained,
    step_size,
    warn_of_prior,
    width_of,
    with_plain_steps,
)
from bayeslayers.optim.gauss_newton import RULES, GaussNewton
from bayeslayers.optim.groups import listed
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import Sync


class VOGN(GaussNewton):
    """Natural-gradient variational inference with a diagonal Gaussian posterior.

    Each step draws weights w from the posterior, takes the mean over examples of the gradient and
    of its square at w, and moves precision and mean by `gaussian.natural_gradient_step_`. Parameters
    of layers that are not Bayesian are trained by Adam, in a parameter group of their own.

    Without an `lr` it chooses what else is not given too, from `dataset_size` and the layers' fan-in, as
    `optim.defaults` explains: lr and clip_radius, precision_lr, and prior and first precision of layers that were
    built with their default values and are not trained yet. With an `lr` the step is the paper's.

    Source: Osawa et al. 2019 (arXiv 1906.02506), Algorithm 1; Khan et al. 2018 (arXiv 1806.04854).

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N. The data-augmentation factor of the paper is
            `temperature = 1 / factor`, not a larger N.
        lr: Step size of the mean, in units of the posterior's natural gradient; None to choose it.
        beta1: Momentum, the weight of the past in the average of gradients, in [0, 1).
        precision_lr: Weight of the new precision in its moving average, in (0, 1]; None for 2e-3 with an `lr`
            of yours, 1e-3 without.
        prior_precision: Precision of the prior for every Bayesian tensor; None keeps the layers', but
            for the choice above.
        init_precision: Precision of the posterior at the start; None keeps the layers', but for that choice, so
            that a loaded posterior is trained further. "curvature" takes it from the first batches: they
            weigh `precision_lr / (1 - (1 - precision_lr)^t)`, the first one 1.
        temperature: T of the tempered posterior; the likelihood counts N/T times. T < 1 sharpens.
            `optim.TemperatureWarmup` moves it over the steps.
        damping: Added to the curvature in the mean's step, >= 0.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws, on the model's device; torch's default one if None.
        loss_reduction: "mean" if the loss is a mean over the batch's examples, "sum" if their sum.
        elements_per_example: Elements (pixels, tokens, labels) that an example's loss is a mean over; 1
            where it is their sum. None finds it: of torch's loss functions, whose ignored labels do
            not count, and of losses that are a mean as a whole; another loss has 1.
        curvature_fraction: Part of the batch, in (0, 1], whose squared gradients estimate the
            curvature of linear and convolution weights: a run of examples from a random one on, which
            is unbiased. What costs nothing (biases, norms) always sees the whole batch.
        groups: Parameter groups with hyperparameters of their own, each a dict of `params` and any of
            lr, beta1, precision_lr, temperature, damping, clip_radius, prior_precision.
        deterministic_lr: Learning rate of parameters that are not Bayesian; None for `lr`, 1e-3 without one.
        sync: Average over the ranks of torch.distributed's default group before each step; "bfloat16" sends numbers
            of that type.
        num_mc_groups: Sample groups: ranks of a group share their draws, groups have their own. One process runs
            them all, each on its part of the batch, `optimizer.part(len(x))`.
        shard: Keep the state of each parameter on one rank alone, which moves it and sends it to the others; needs
            `sync`. See docs/distributed.md for the memory that it saves.
        vectorise: Run the draws of `step(closure)` at once, by `torch.func.vmap`. The closure leaves
            `backward` to the optimizer then. Faster for small networks and batches alone.
        clip_radius: Bound on each entry of the mean's step before `lr`, > 0; None for no bound with an `lr` of
            yours, and one that no entry moves by more than 0.003 without.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = bl.BayesLinear(2, 1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> optimizer = bl.VOGN(net, dataset_size=8)
        >>> with optimizer.sampled():
        ...     torch.nn.functional.mse_loss(net(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float | None = None,
        beta1: float = 0.9,
        precision_lr: float | None = None,
        prior_precision: float | None = None,
        init_precision: float | Literal["curvature"] | None = None,
        temperature: float = 1.0,
        damping: float = 0.0,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        loss_reduction: Reduction = "mean",
        curvature_fraction: float = 1.0,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        sync: Sync = False,
        vectorise: bool = False,
        elements_per_example: float | None = None,
        clip_radius: float | None = None,
        num_mc_groups: int = 1,
        shard: bool = False,
    ):
        arguments, chooses = locals(), lr is None
        bound = LARGEST_MOVE if chooses else math.inf  # of the move; `_scale_steps` makes it one of the step
        groups = [{**group, "params": listed(group["params"])} for group in with_plain_steps(groups or ())]
        plain = {parameter for group in groups if "lr" in group for parameter in group["params"]}
        if chooses:
            self._adam_lr = ADAM_LR if deterministic_lr is None else deterministic_lr
        chosen = {
            "lr": 1.0 if lr is None else lr,
            "precision_lr": precision_lr if precision_lr is not None else PRECISION_LR if chooses else 2e-3,
            "clip_radius": bound if clip_radius is None else clip_radius,
        }
        super().__init__(
            model,
            dataset_size,
            {**RULES, "clip_radius": radius},
            arguments | chosen,
            Options.among(arguments, groups=groups),
            curvature_fraction=curvature_fraction,
            loss_reduction=loss_reduction,
            vectorise=vectorise,
        )
        # Until the first step, for a configuration is tried on one example. Who gives an lr has chosen both.
        self._unchecked_prior = prior_precision if chooses else None
        if chooses:
            self._scale_steps(
                fill_untrained(
                    list(self._sites.values()),
                    self.dataset_size / temperature,
                    prior=prior_precision is None,
                    precision=init_precision is None,
                ),
                plain,
                clip_radius,
            )

    def _update(self, group: dict[str, Any]) -> None:
        if self._unchecked_prior is not None:
            warn_of_prior(self._unchecked_prior, self._ess(group))
            self._unchecked_prior = None
        super()._update(group)

    def _scale_steps(self, hessian: float, plain: set[nn.Parameter], clip_radius: float | None) -> None:
        """Choose `lr` and the bound on the step, from the precision over ess, where neither was given."""
        factor, largest = step_size(width_of(site.mean for site in self._sites.values()))
        for group in [*self.param_groups, self.defaults]:
            if group.get("kind") == "deterministic" or plain.intersection(group.get("params", ())):
                continue
            group["lr"] = factor * hessian
            if clip_radius is None and group["clip_radius"] == self.defaults["clip_radius"]:
                group["clip_radius"] = largest / group["lr"]


class OGN(GaussNewton):
    """VOGN without draws: gradient and curvature at the mean, the posterior's precision beside it.

    The paper's ablation and its first step of tuning: match a tuned Adam with it, then turn on the
    draws. The precision it leaves is that of an online diagonal Laplace approximation, so `predict`
    draws from it as from any posterior.

    Source: Osawa et al. 2019 (arXiv 1906.02506), section 3 and Table 1.

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        lr: Step size of the mean; this and the following as for `VOGN`.
        beta1: Momentum.
        precision_lr: Weight of the new precision.
        prior_precision: Precision of the prior.
        init_precision: Precision at the start; "curvature" takes it from the first batches.
        temperature: T of the tempered posterior.
        damping: Added to the curvature in the mean's step.
        generator: Source of the part of the batch that `curvature_fraction` picks.
        loss_reduction: "mean" or "sum" over the batch's examples.
        elements_per_example: Elements that an example's loss is a mean over.
        curvature_fraction: Part of the batch that estimates the curvature.
        groups: Parameter groups with hyperparameters of their own.
        deterministic_lr: Learning rate of parameters that are not Bayesian.
        sync: Average over ranks before each step.
        shard: Keep the state of each parameter on one rank alone.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.
    """

    _sampling_counterpart = "VOGN"

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float = 1e-3,
        beta1: float = 0.9,
        precision_lr: float = 2e-3,
        prior_precision: float | None = None,
        init_precision: float | Literal["curvature"] | None = None,
        temperature: float = 1.0,
        damping: float = 0.0,
        generator: torch.Generator | None = None,
        loss_reduction: Reduction = "mean",
        curvature_fraction: float = 1.0,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        sync: Sync = False,
        elements_per_example: float | None = None,
        shard: bool = False,
    ):
        arguments = locals()
        super().__init__(
            model,
            dataset_size,
            RULES,
            arguments,
            Options.among(arguments),
            curvature_fraction=curvature_fraction,
            loss_reduction=loss_reduction,
        )
