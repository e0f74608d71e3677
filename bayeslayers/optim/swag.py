"""SWAG: a diagonal Gaussian posterior from the weights that SGD passes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one, fraction, non_negative, positive
from bayeslayers.distributions.gaussian import POINT_PRECISION
from bayeslayers.dtypes import at_least_float32
from bayeslayers.optim.adam import momentum_average
from bayeslayers.optim.averages import Recorded
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.bounds import NaturalBounds, magnitudes
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import Sync
from bayeslayers.readings import Readings
from bayeslayers.sampling.sharing import in_use

_RULES = {"lr": non_negative, "beta1": fraction, "temperature": positive}


def add_to_moments_(mean: Tensor, variance: Tensor, value: Tensor, count: int) -> None:
    """Fold the `count`-th value into a running mean and variance, in place (Welford 1962).

        mean_n = mean + (w - mean) / n,   variance_n = (n - 1) / n (variance + (w - mean)^2 / n)

    It is E[w^2] - E[w]^2 without its cancellation, which leaves float32 no digit of a deviation below 3e-4 |w|.
    """
    change = value - mean
    mean.add_(change, alpha=1 / count)
    variance.addcmul_(change, change, value=1 / count).mul_((count - 1) / count)


class SWAG(VariationalOptimizer):
    """Stochastic weight averaging, Gaussian: SGD, and the moments of the weights along its path.

        m <- m - lr g_bar,   g = grad + prior_precision / ess (m - prior_mean)
        posterior: N(E[m], variance_scale (E[m^2] - E[m]^2)),  E over the steps from `start_step` on

    with ess = N / T and g_bar the average of g with momentum. Keep `lr` constant from `start_step` on, and high enough
    that the weights move. All parameters are trained this way and averaged, those that are not uncertain too.

    `finalize()` writes averages and precisions to the model. Until then the model predicts as the point estimate
    that SGD is at, and its posterior cannot be saved. The next step takes training up where `finalize` found it.
    A weight that has not moved gets a standard deviation of 2^-23, float32's rounding of a weight of size 1, which is
    added to all: 1 / 0 is no precision. Running statistics of BatchNorm are those of SGD's weights: after `finalize`
    recompute them by `torch.optim.swa_utils.update_bn(loader, model)`.

    Source: Maddox et al. 2019 (arXiv 1902.02476), section 3.2, SWAG-Diagonal.

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place; precisions are
            overwritten by the first step.
        dataset_size: Number of training examples N.
        lr: Step size of all parameters: SGD's own, times 1 / (1 - momentum) where torch's SGD has momentum.
        beta1: Momentum, the weight of the past in the average of gradients, in [0, 1).
        start_step: Number of the first step whose weights are averaged, >= 1.
        average_every: Steps from one average to the next; the paper's is an epoch's.
        variance_scale: Factor of the variance, > 0. The paper takes 1/2 where it adds a term of low rank.
        prior_precision: Precision of the prior, N/T times weight decay; None keeps the layers'.
        temperature: T; the likelihood counts N/T times against the prior.
        groups: Parameter groups with hyperparameters of their own, each a dict of `params` and any of
            lr, beta1, temperature, prior_precision.
        deterministic_lr: Learning rate of parameters that are not Bayesian; None for `lr`.
        sync: Average gradients over the ranks of torch.distributed's default group before each step.

    Raises:
        ValueError: If an argument breaks its rule, or no layer of the model can become Bayesian.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = bl.BayesLinear(2, 1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> optimizer = bl.SWAG(net, dataset_size=8, start_step=1)
        >>> for _ in range(3):
        ...     with optimizer.sampled():
        ...         torch.nn.functional.mse_loss(net(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.finalize()
    """

    _sampling_counterpart: ClassVar[str | None] = "VOGN"

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float = 0.1,
        beta1: float = 0.9,
        start_step: int = 1000,
        average_every: int = 1,
        variance_scale: float = 1.0,
        prior_precision: float | None = None,
        temperature: float = 1.0,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        sync: Sync = False,
    ):
        arguments = locals()
        self.start_step = at_least_one("start_step", start_step)
        self.average_every = at_least_one("average_every", average_every)
        self.variance_scale = positive("variance_scale", variance_scale)
        self._points: set[Tensor] = set()  # whose precision says that they are the iterate
        super().__init__(model, dataset_size, _RULES, arguments, Options.among(arguments))

    @property
    def steps_to_posterior(self) -> int:
        """The number of steps after which there is a posterior to write: a variance takes two averages."""
        return self.start_step + self.average_every

    def _scope(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        self._train_on()
        return self._draw(noise)

    def _record(self) -> Recorded | None:
        return None if all(parameter.grad is None for parameter in self._names) else Recorded({})

    def _reach(self, group: dict[str, Any]) -> float:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return 0.0
        if group["kind"] == "deterministic":
            averages = [self.state[p]["momentum"] for p in parameters if "momentum" in self.state.get(p, ())]
            grads = [p.grad for p in parameters if p.grad is not None]
            mean, gradient = magnitudes(Readings(), parameters, [*grads, *averages])()
            return mean + group["lr"] * gradient
        ess = self._ess(group)
        return NaturalBounds(Readings(), self._bundles(group), ()).reach(ess, group["lr"], ess)

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state, grad = self.state[parameter], parameter.grad
            state["step"] = state.get("step", 0) + 1
            if site := self._sites.get(parameter):
                grad = grad + site.prior_precision / self._ess(group) * (site.mean - site.prior_mean)
            parameter.sub_(momentum_average(state, grad, group["beta1"]), alpha=group["lr"])
            since = state["step"] - self.start_step
            if since >= 0 and since % self.average_every == 0:
                self._average(parameter, state)

    def _update_deterministic(self, group: dict[str, Any]) -> None:
        self._update(group)

    @staticmethod
    def _average(parameter: Tensor, state: dict[str, Any]) -> None:
        value = at_least_float32(parameter)
        if "averages" not in state:
            state |= {"averages": 0, "average": torch.zeros_like(value), "variance": torch.zeros_like(value)}
        state["averages"] += 1
        add_to_moments_(state["average"], state["variance"], value, state["averages"])

    @torch.no_grad()
    def finalize(self) -> None:
        """Write the averages to the model, and precisions to its uncertain tensors.

        Raises:
            RuntimeError: If there were fewer than two averages so far.
        """
        found: dict[Any, dict[str, Any]] = {
            p: state for p, state in self.state.items() if state.get("averages", 0) >= 2
        }
        if not found:
            steps = max((state.get("step", 0) for state in self.state.values()), default=0)
            raise RuntimeError(
                f"finalize() must follow {self.steps_to_posterior} steps, for a variance takes two averages of the "
                f"weights, got {steps}. Train on, or lower start_step."
            )
        with in_use(self.model, trains=True):
            for parameter, state in found.items():
                if "iterate" in state:  # written already
                    continue
                state["iterate"] = parameter.clone()
                parameter.copy_(state["average"])
                if site := self._sites.get(parameter):
                    site.precision.copy_(1 / (self.variance_scale * state["variance"] + 1 / POINT_PRECISION))

    def _forget_steps(self) -> None:
        super()._forget_steps()
        self._points.clear()

    @torch.no_grad()
    def _train_on(self) -> None:
        """Take training up where `finalize` found it, with the precisions of a point estimate."""
        for parameter, state in self.state.items():
            if "iterate" in state:
                parameter.copy_(state.pop("iterate"))
                self._points.discard(parameter)
        for parameter, site in self._sites.items():
            if parameter.requires_grad and parameter not in self._points:
                site.precision.fill_(POINT_PRECISION)
                self._points.add(parameter)
