"""VOGN, the variational online Gauss-Newton method, and OGN, the same without draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayeslayers.checks import fraction, non_negative, positive, radius
from bayeslayers.curvature.counts import Reduction
from bayeslayers.distributions.gaussian import natural_gradient_step_
from bayeslayers.optim.adam import corrected_weight, momentum_average
from bayeslayers.optim.averages import Recorded
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.defaults import (
    ADAM_LR,
    LARGEST_MOVE,
    LR,
    PRECISION_LR,
    fill_untrained,
    warn_of_prior,
    with_plain_steps,
)
from bayeslayers.optim.groups import Rules, first_precision, listed
from bayeslayers.optim.guard import natural_reach
from bayeslayers.sampling import Tracker, layers_with_curvature
from bayeslayers.sampling.placement import placed

_RULES = {
    "lr": non_negative,
    "beta1": fraction,
    "precision_lr": partial(fraction, one=True),
    "temperature": positive,
    "damping": non_negative,
}


class _GaussNewton(VariationalOptimizer):
    """The step that VOGN and OGN share."""

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        defaults: Mapping[str, Any],
        *,
        init_precision: float | Literal["curvature"] | None,
        curvature_fraction: float,
        loss_reduction: Reduction,
        vectorise: bool = False,
        rules: Rules = _RULES,
        **options: Any,
    ):
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        self.loss_reduction = loss_reduction
        self.curvature_fraction = fraction("curvature_fraction", curvature_fraction, one=True)
        self.vectorise, self._at_once = vectorise, 1
        value, self._from_curvature = first_precision(init_precision)
        super().__init__(model, dataset_size, rules, defaults, init_precision=value, **options)

    def _bind(self) -> None:
        super()._bind()
        self._tracker = Tracker(layers_with_curvature(self._sites.values()), model=self.model)

    @contextmanager
    def _scope(self, noise: Mapping[str, Tensor] | None) -> Iterator[None]:
        with self._draw(noise), self._track():
            yield

    def _track(self) -> AbstractContextManager[Tracker]:
        return self._tracker.track(self.curvature_fraction, self._generator)

    def _clear_record(self) -> None:
        self._tracker.clear()

    def _record(self) -> Recorded | None:
        examples = self._tracker.examples
        if examples == 0:
            return None
        squares: dict[nn.Parameter, Tensor] = {}
        for parameter, site in self._sites.items():
            leaf = self._tracker.leaves.get(site.name)
            if leaf is not None and leaf.grad is not None:
                squares[parameter] = leaf.grad
            elif parameter.grad is not None:
                raise self._past_its_layer(site)
        # What makes sums over examples and draws, in the units of the loss, means over them.
        seen = self._elements(examples)
        if self.loss_reduction == "sum":
            mean = 1 / (seen.examples * self._at_once)
            return Recorded(squares, mean * seen.number / seen.examples, mean)
        return Recorded(squares, seen.number / self._at_once, 1 / self._at_once)

    def _run_draws(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        if not self.vectorise or self.num_samples == 1:
            return super()._run_draws(closure)
        self._at_once, self._losses.batched = self.num_samples, True
        try:
            with torch.enable_grad(), self._recording(self._track):
                losses, outputs = self._run_at_once(closure)
        finally:
            self._at_once, self._losses.batched = 1, False
        return losses.mean(), None if outputs is None else outputs.detach().mean(0)

    def _run_at_once(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
        """Run the closure under all draws by `vmap`, and go backward; return losses and outputs, draws first."""
        if any(isinstance(m, _BatchNorm) and m.training and m.track_running_stats for m in self.model.modules()):
            raise RuntimeError(
                "vectorise must be off for a network whose BatchNorm keeps running statistics, got it on."
            )
        sites = list(self._sites.values())

        def run(*drawn: Tensor) -> tuple[Tensor, ...]:
            with placed(sites, {site.name: value for site, value in zip(sites, drawn, strict=True)}):
                result = closure()
            return result if isinstance(result, tuple) else (result,)

        draws = []
        for _ in range(self.num_samples):
            with self._sampler.draw():
                draws.append([site.value for site in sites])
        stacked = [torch.stack(values) for values in zip(*draws, strict=True)]
        losses, *outputs = torch.func.vmap(run, randomness="different")(*stacked)
        self._refuse_bad_loss(losses)
        losses.sum().backward()
        return losses.detach(), outputs[0] if outputs else None

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        sites = [self._sites[p] for p in parameters]
        # The new precision is a mean of the old one and of the prior's, and more.
        least = [precision for site in sites for precision in (site.precision, site.prior_precision)]
        return natural_reach(sites, self._momenta(parameters), least, self._ess(group), group["lr"])

    def _update(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            site, state = self._sites[parameter], self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            precision_lr = group["precision_lr"]
            natural_gradient_step_(
                site.mean,
                site.precision,
                momentum_average(state, parameter.grad, group["beta1"]),
                self._averages.statistics[parameter],
                prior_mean=site.prior_mean,
                prior_precision=site.prior_precision,
                ess=self._ess(group),
                lr=group["lr"],
                precision_lr=corrected_weight(precision_lr, state["step"]) if self._from_curvature else precision_lr,
                damping=group["damping"],
                curvature_scale=self._averages.scale,
                clip_radius=group.get("clip_radius", math.inf),
            )


class VOGN(_GaussNewton):
    """Natural-gradient variational inference with a diagonal Gaussian posterior.

    Each step draws weights w from the posterior, takes the mean over examples of the gradient and
    of its square at w, and moves precision and mean by `gaussian.natural_gradient_step_`. Parameters
    of layers that are not Bayesian are trained by Adam, in a parameter group of their own.

    Without an `lr` it chooses what else is not given too, from `dataset_size` and the layers' fan-in, as
    `optim.defaults` explains: lr and clip_radius, precision_lr, and prior and first precision of layers that were
    built with their default values and are not trained yet. With an `lr` the step is the paper's.

    Source: Osawa et al. 2019 (arXiv 1906.02506), Algorithm 1; Khan et al. 2018 (arXiv 1806.04854).

    Args:
        model: Model with Bayesian layers, on its device already.
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
        sync: Average over the ranks of torch.distributed's default group before each step.
        vectorise: Run the draws of `step(closure)` at once, by `torch.func.vmap`. The closure leaves
            `backward` to the optimizer then. Faster for small networks and batches alone.

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
        sync: bool = False,
        vectorise: bool = False,
        elements_per_example: float | None = None,
        clip_radius: float | None = None,
    ):
        chooses = lr is None
        bound = LARGEST_MOVE / LR if chooses else math.inf
        groups = [{**group, "params": listed(group["params"])} for group in with_plain_steps(groups or ())]
        plain = {parameter for group in groups if "lr" in group for parameter in group["params"]}
        if chooses:
            self._adam_lr = ADAM_LR if deterministic_lr is None else deterministic_lr
        super().__init__(
            model,
            dataset_size,
            {
                "lr": LR if lr is None else lr,
                "beta1": beta1,
                "precision_lr": precision_lr if precision_lr is not None else PRECISION_LR if chooses else 2e-3,
                "temperature": temperature,
                "damping": damping,
                "clip_radius": bound if clip_radius is None else clip_radius,
            },
            rules={**_RULES, "clip_radius": radius},
            vectorise=vectorise,
            prior_precision=prior_precision,
            init_precision=init_precision,
            num_samples=num_samples,
            generator=generator,
            loss_reduction=loss_reduction,
            elements_per_example=elements_per_example,
            curvature_fraction=curvature_fraction,
            groups=groups,
            deterministic_lr=deterministic_lr,
            sync=sync,
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
        """Multiply `lr` by the precision over ess, and divide the bound on the step, where neither was given."""
        for group in [*self.param_groups, self.defaults]:
            if group.get("kind") == "deterministic" or plain.intersection(group.get("params", ())):
                continue
            group["lr"] *= hessian
            if clip_radius is None and group["clip_radius"] == self.defaults["clip_radius"]:
                group["clip_radius"] = LARGEST_MOVE / (LR * hessian)


class OGN(_GaussNewton):
    """VOGN without draws: gradient and curvature at the mean, the posterior's precision beside it.

    The paper's ablation and its first step of tuning: match a tuned Adam with it, then turn on the
    draws. The precision it leaves is that of an online diagonal Laplace approximation, so `predict`
    draws from it as from any posterior.

    Source: Osawa et al. 2019 (arXiv 1906.02506), section 3 and Table 1.

    Args:
        model: Model with Bayesian layers, on its device already.
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

    Raises:
        ValueError: If an argument breaks its rule, or the model has no Bayesian layer.
    """

    _drawing_twin = "VOGN"

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
        sync: bool = False,
        elements_per_example: float | None = None,
    ):
        super().__init__(
            model,
            dataset_size,
            {
                "lr": lr,
                "beta1": beta1,
                "precision_lr": precision_lr,
                "temperature": temperature,
                "damping": damping,
            },
            prior_precision=prior_precision,
            init_precision=init_precision,
            generator=generator,
            loss_reduction=loss_reduction,
            elements_per_example=elements_per_example,
            curvature_fraction=curvature_fraction,
            groups=groups,
            deterministic_lr=deterministic_lr,
            sync=sync,
        )
