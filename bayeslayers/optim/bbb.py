"""Bayes by Backprop: Adam on the mean and the log standard deviation of a diagonal Gaussian posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import fraction, non_negative, positive
from bayeslayers.curvature.kernels.step import elbo_step_
from bayeslayers.layers.perturbation import Estimator
from bayeslayers.optim.adam import ADAM_STATE, adam_direction
from bayeslayers.optim.averages import Recorded, corrected_weight
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.bounds import adam_ratio, magnitudes, smallest
from bayeslayers.optim.bundle import pieces
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import Sync
from bayeslayers.readings import Readings
from bayeslayers.sampling import Sampler

LOG_SIGMA = "log_sigma_"  # before the name of what the state keeps of the logarithm of sigma
POSTERIOR = ("mean", "precision", "grad", "log_sigma_grad", "prior_mean", "prior_precision")
AVERAGES = {  # of the kernel, by the names of what the state keeps
    "momentum": "momentum",
    "second": "second_moment",
    "log_momentum": f"{LOG_SIGMA}momentum",
    "log_second": f"{LOG_SIGMA}second_moment",
}
_RULES = {"lr": non_negative, "beta1": fraction, "beta2": fraction, "temperature": positive}


class BBB(VariationalOptimizer):
    """Bayes by Backprop: the evidence lower bound, descended by Adam on (mean, log sigma).

        objective = E_q[mean_i loss_i(w)] + T/N KL(q || prior),  w = mean + sigma noise
        d/d mean      = g         + T/N prior_precision (mean - prior_mean)
        d/d log sigma = g . noise sigma + T/N (prior_precision sigma^2 - 1)

    with g the gradient at the drawn weight; under "local" and "flipout" autograd gives the first term
    of both lines. The KL divergence's gradient is exact. The precision is multiplied by
    exp(-2 step of log sigma), so it stays positive. Unlike VOGN's, the fixed point is the optimum of
    the bound itself. The paper's scale-mixture priors are left out: priors here are Gaussian.

    Source: Blundell et al. 2015 (arXiv 1505.05424), section 3.2, there with log(1 + exp(rho)) for
    sigma; Adam: Kingma & Ba 2015 (arXiv 1412.6980).

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        lr: Step size of mean and log sigma, and of parameters that are not Bayesian.
        beta1: Weight of the past in the average of gradients, in [0, 1).
        beta2: Weight of the past in the average of squared gradients, in [0, 1).
        prior_precision: Precision of the prior for every Bayesian tensor; None keeps the layers'.
        init_precision: Precision of the posterior at the start; None keeps the layers'.
        temperature: T of the tempered posterior; the likelihood counts N/T times. T < 1 sharpens.
        estimator: "weights" draws each weight once for the batch, "local" and "flipout" draw the outputs of
            linear layers and convolutions by example, for gradients of a lower variance; see `sampled`.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws, on the model's device; torch's default one if None.
        groups: Parameter groups with hyperparameters of their own, each a dict of `params` and any of
            lr, beta1, beta2, temperature, prior_precision.
        sync: Average over the ranks of torch.distributed's default group before each step; "bfloat16" sends numbers
            of that type.
        num_mc_groups: Sample groups: ranks of a group share their draws, groups have their own. One process runs
            them all, each on its part of the batch, `optimizer.part(len(x))`.
        shard: Keep the state of each parameter on one rank alone, which moves it and sends it to the others; needs
            `sync`. See docs/distributed.md for the memory that it saves.
        how: The former name of `estimator`, which it replaces if given.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = bl.BayesLinear(2, 1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> optimizer = bl.BBB(net, dataset_size=8, estimator="local")
        >>> with optimizer.sampled():
        ...     torch.nn.functional.mse_loss(net(x), y).backward()
        >>> optimizer.step()
    """

    _statistic: ClassVar[str] = "gradient of log sigma"
    _loss_power: ClassVar[int] = 1
    _reads_once: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        prior_precision: float | None = None,
        init_precision: float | None = None,
        temperature: float = 1.0,
        estimator: Estimator = "weights",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        sync: Sync = False,
        how: Estimator | None = None,
        num_mc_groups: int = 1,
        shard: bool = False,
    ):
        self.estimator: Estimator = estimator if how is None else how
        arguments = locals()
        super().__init__(model, dataset_size, _RULES, arguments, Options.among(arguments))

    def _prepare(self) -> None:
        super()._prepare()
        self._sampler = Sampler(
            list(self._sites.values()), self._generator, estimator=self.estimator, differentiable=True
        )

    def _scope(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        return self._sampler.draw(noise)

    def _clear_record(self) -> None:
        for leaf in self._sampler.leaves.values():
            leaf.grad = None

    def _record(self) -> Recorded | None:
        leaves, self._sampler.leaves = self._sampler.leaves, {}
        if all(parameter.grad is None for parameter in self._names):
            return None
        gradients: dict[nn.Parameter, Tensor] = {}
        for parameter, site in self._sites.items():
            leaf = leaves.get(site.name)
            if leaf is not None and leaf.grad is not None:
                gradients[parameter] = leaf.grad * leaf.detach()  # a leaf is proportional to sigma
            elif parameter.grad is not None:
                raise self._without_its_layer(site)
        return Recorded(gradients)

    def _posterior_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        parameters = [p for p in group["params"] if p.grad is not None]
        reach, statistics = self._reach_of(group, readings, parameters), self._averages.statistics
        numbers = magnitudes(readings, [x for p in parameters for x in (p.grad, statistics[p]) if x is not None])
        return lambda: reach() + self._factor() * numbers()[0]

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        return self._reach_of(group, Readings(), parameters)()

    def _reach_of(
        self, group: dict[str, Any], readings: Readings, parameters: list[nn.Parameter]
    ) -> Callable[[], float]:
        """Return what will bound means and precisions after the step."""
        precisions = [self._sites[p].precision for p in parameters]
        found, least = magnitudes(readings, parameters, precisions), smallest(readings, precisions)
        step = group["lr"] * adam_ratio(group["beta1"], group["beta2"])

        def reach() -> float:
            (mean, precision), variance = found(), 1 / least() if least() > 0 else math.inf
            return mean + step + max(precision, variance) * math.exp(min(2 * step, 700.0))

        return reach

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            site, state, ess = self._sites[parameter], self.state[parameter], self._ess(group)
            state["step"] = state.get("step", 0) + 1
            names = ADAM_STATE if group["beta1"] else ADAM_STATE[1:]
            for name in (*names, *(LOG_SIGMA + name for name in names)):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            moving = {
                "mean": parameter,
                "grad": parameter.grad,
                "precision": site.precision,
                "log_sigma_grad": self._averages.statistics[parameter],
                "prior_mean": site.prior_mean,
                "prior_precision": site.prior_precision,
            } | {name: value for name, value in state.items() if isinstance(value, Tensor)}
            if _move_by_kernel(moving, group, state["step"], ess, self._averages.scale):
                continue
            for piece in pieces(moving):
                _move(piece, group, state["step"], ess, self._averages.scale)


def _move_by_kernel(moving: dict[str, Tensor], group: dict[str, Any], step: int, ess: float, scale: float) -> bool:
    """Do what `_move` does by a kernel; return False where none can run."""
    averages = {name: moving[key] for name, key in AVERAGES.items() if key in moving}
    if not group["beta1"]:
        averages = {name: value for name, value in averages.items() if "second" in name}
    newest, rest = corrected_weight(1 - group["beta1"], step) if group["beta1"] else 1.0, 1 - group["beta2"]
    numbers = (ess, scale, group["lr"], newest, rest, 1 - group["beta2"] ** step)
    return elbo_step_({name: moving[name] for name in POSTERIOR} | averages, numbers)


def _move(piece: dict[str, Any], group: dict[str, Any], step: int, ess: float, scale: float) -> None:
    """Move a piece of a tensor's mean and precision by Adam, in the mean and in the logarithm of sigma."""
    state = {**piece, "step": step}
    prior_precision, difference = piece["prior_precision"], piece["mean"] - piece["prior_mean"]
    grad = torch.addcmul(piece["grad"], prior_precision, difference, value=1 / ess)
    log_sigma_grad = (prior_precision / piece["precision"]).sub_(1).div_(ess).add_(piece["log_sigma_grad"], alpha=scale)
    piece["mean"].add_(adam_direction(state, grad, group), alpha=-group["lr"])
    move = adam_direction(state, log_sigma_grad, group, LOG_SIGMA)
    piece["precision"].mul_(move.mul_(2 * group["lr"]).exp_())
