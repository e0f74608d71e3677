"""VOGN, the variational online Gauss-Newton method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bayeslayers.checks import fraction, non_negative, positive
from bayeslayers.gaussian import natural_gradient_step_
from bayeslayers.optim.base import LossReduction, VariationalOptimizer, adam_update, momentum_average


class VOGN(VariationalOptimizer):
    """Natural-gradient variational inference with a diagonal Gaussian posterior.

    Each step draws weights w from the posterior, takes the mean over examples of the gradient and
    of its square at w, and moves precision and mean by `gaussian.natural_gradient_step_`. Parameters
    of layers that are not Bayesian are trained by Adam with the same `lr` and `beta1`, in a
    parameter group of their own.

    Source: Osawa et al. 2019 (arXiv 1906.02506), Algorithm 1; Khan et al. 2018 (arXiv 1806.04854).

    Args:
        model: Model with Bayesian layers, on its device already.
        dataset_size: Number of training examples N. The data-augmentation factor of the paper is
            `temperature = 1 / factor`, not a larger N.
        lr: Step size of the mean, in units of the posterior's natural gradient.
        beta1: Momentum, the weight of the past in the average of gradients, in [0, 1).
        precision_lr: Weight of the new precision in its moving average, in (0, 1].
        prior_precision: Precision of the prior for every Bayesian tensor; None keeps the layers'.
        init_precision: Precision of the posterior at the start; None keeps the layers', so that a
            loaded posterior is trained further.
        temperature: T of the tempered posterior; the likelihood counts N/T times. T < 1 sharpens.
        damping: Added to the curvature in the mean's step, >= 0.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws, on the model's device; torch's default one if None.
        loss_reduction: "mean" if the loss is a mean over the batch's examples, "sum" if their sum.

    Raises:
        ValueError: If an argument breaks its rule, or the model has no Bayesian layer.

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
        lr: float = 1e-3,
        beta1: float = 0.9,
        precision_lr: float = 2e-3,
        prior_precision: float | None = None,
        init_precision: float | None = None,
        temperature: float = 1.0,
        damping: float = 0.0,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        loss_reduction: LossReduction = "mean",
    ):
        defaults = {
            "lr": non_negative("lr", lr),
            "beta1": fraction("beta1", beta1),
            "beta2": 0.999,  # of Adam, for the deterministic parameters
            "precision_lr": fraction("precision_lr", precision_lr, one=True),
            "temperature": positive("temperature", temperature),
            "damping": non_negative("damping", damping),
        }
        super().__init__(
            model,
            dataset_size,
            defaults,
            prior_precision=prior_precision,
            init_precision=init_precision,
            num_samples=num_samples,
            generator=generator,
            loss_reduction=loss_reduction,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the posterior from the draws since the last step.

        Args:
            closure: Clears gradients, computes the loss, calls `backward` and returns `loss` or
                `(loss, output)`. It runs under `num_samples` draws. Without it, the draws are those
                of `with optimizer.sampled():` scopes since the last step.

        Returns:
            With a closure the mean over draws of the loss, and of the output if it returns one (a
            tensor is averaged, anything else is that of the last draw); None without one.

        Raises:
            FloatingPointError: If loss, gradient or curvature is not finite. Mean, precision and
                momentum are then as they were.
            RuntimeError: If there was no draw since the last step.
        """
        loss, output = (None, None) if closure is None else self._run(closure)
        if not self._unscale():
            return None
        self._refuse_bad_step()
        for group in self.param_groups:
            if group["kind"] == "bayesian":
                self._update(group)
            else:
                adam_update(group["params"], group, self.state)
        self._curvature, self._draws = {}, 0
        return loss if output is None else (loss, output)

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            site, state = self._sites[parameter], self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            natural_gradient_step_(
                site.mean,
                site.precision,
                momentum_average(state, parameter.grad, group["beta1"]),
                self._curvature[parameter],
                prior_mean=site.prior_mean,
                prior_precision=site.prior_precision,
                ess=self.dataset_size / group["temperature"],
                lr=group["lr"],
                precision_lr=group["precision_lr"],
                damping=group["damping"],
                curvature_scale=self._curvature_scale,
            )
