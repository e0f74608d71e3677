"""IVON, the improved variational online Newton method: any parameter, and no per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayeslayers.checks import fraction, non_negative, positive, radius
from bayeslayers.distributed.messages import Row
from bayeslayers.distributions.gaussian import mean_step_
from bayeslayers.optim.averages import Recorded
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.bounds import NaturalBounds, retracted_bound
from bayeslayers.optim.bundle import Bundle
from bayeslayers.optim.defaults import chosen_for_ivon, prior_hessian, with_plain_steps
from bayeslayers.optim.groups import attach_missing, listed
from bayeslayers.optim.guard import refuse_new_precisions
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import Sync, statistics_of_norms, weighted_sum
from bayeslayers.optim.shared_step import group_of
from bayeslayers.readings import Readings
from bayeslayers.sampling import posterior

Estimator = Literal["price", "gradsq"]
LR, BETA2 = 0.3, 0.9995  # where no lr is given; its Hessians are noisier than VOGN's, and spoil larger steps

_RULES = {
    "lr": non_negative,
    "beta1": fraction,
    "beta2": fraction,
    "hess_init": positive,
    "weight_decay": positive,
    "clip_radius": radius,
    "temperature": positive,
}


class IVON(VariationalOptimizer):
    """Natural-gradient variational inference at the cost of Adam, for any network.

    Every parameter that requires a gradient becomes uncertain, also those of modules that are no
    Bayesian layers: attention, recurrent networks, parameters of your own. Frozen ones are left alone.
    With ess = N / T and the posterior's precision p = ess (h + weight_decay), a step is

        h_hat = g (w - m) p     "price": unbiased for the diagonal of the Hessian
        h_hat = ess g^2         "gradsq": of the batch's gradient; never negative
        p <- p (1 - r + r^2 / 2)             r = (1 - beta2) (p - ess h_hat - prior_precision) / p
        m <- m - lr (ess g_bar + prior_precision (m - prior_mean)) / p

    with g the gradient at the draw w, h_hat averaged over draws and g_bar the average over steps,
    corrected for its start. 1 - r + r^2 / 2 = ((1 - r)^2 + 1) / 2 >= 1/2, so p stays positive whatever
    h_hat is. `weight_decay` sets the priors at the start, prior_precision = ess weight_decay; they
    are buffers beside the parameters from then on, of mean 0 but in Bayesian normalisation layers.

    The loss is the mean over the batch's examples. Under `sync` "gradsq" squares the mean of the gradients of all
    ranks that share a draw, which sends those of each draw.

    Without an `lr` it chooses what else is not given too, from `dataset_size` and the fan-in of the parameters, as
    `optim.defaults` explains. With an `lr` the defaults are those of its authors.

    Source: Shen et al. 2024 (arXiv 2402.17641), Algorithm 1; the precision's step: Lin et al. 2020
    (arXiv 2002.10060).

    Args:
        model: Any network, on its device already.
        dataset_size: Number of training examples N.
        lr: Step size of the mean; None to choose it.
        beta1: Momentum, the weight of the past in the average of gradients, in [0, 1).
        beta2: Weight of the past in the average of Hessians, in [0, 1); None for 0.99999 with an `lr` of
            yours, 0.9995 without.
        hess_init: Hessian h at the start, > 0; None for 1 with an `lr` of yours, at least 1 without.
        weight_decay: Prior precision over ess, > 0.
        clip_radius: Bound on each entry of the mean's step before `lr`, > 0; None for no bound with an `lr` of
            yours, and one that no entry moves by more than 0.003 without.
        rescale_lr: Multiply `lr` by hess_init + weight_decay, which makes its scale that of SGD.
        estimator: "price" or "gradsq", the estimate of the Hessian.
        num_samples: Draws per `step(closure)`.
        temperature: T of the tempered posterior; the likelihood counts N/T times. T < 1 sharpens.
        generator: Source of the draws, on the model's device; torch's default one if None.
        groups: Parameter groups with hyperparameters of their own, each a dict of `params` and any of
            lr, beta1, beta2, hess_init, weight_decay, clip_radius, temperature.
        keep_posterior: Keep precision and prior where the model has them, as a loaded one; hess_init
            and weight_decay then set those of the other parameters, and the scale of `lr`.
        sync: Average over the ranks of torch.distributed's default group before each step; "bfloat16" sends numbers
            of that type.
        num_mc_groups: Sample groups: ranks of a group share their draws, groups have their own. One process runs
            them all, each on its part of the batch, `optimizer.part(len(x))`.
        shard: Keep the state of each parameter on one rank alone, as for `VOGN`; not with "gradsq".

    Raises:
        ValueError: If an argument breaks its rule, or no parameter requires a gradient.
        TypeError: If a parameter that requires a gradient is complex.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = torch.nn.Linear(2, 3)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> optimizer = bl.IVON(net, dataset_size=8)
        >>> with optimizer.sampled():
        ...     torch.nn.functional.cross_entropy(net(x), y).backward()
        >>> optimizer.step()
        >>> bl.predict(net, x).probs.shape
        torch.Size([8, 3])
    """

    _keeps_noise = _moves_bundles = _reads_once = True

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        lr: float | None = None,
        beta1: float = 0.9,
        beta2: float | None = None,
        hess_init: float | None = None,
        weight_decay: float = 1e-4,
        clip_radius: float | None = None,
        rescale_lr: bool = True,
        estimator: Estimator = "price",
        num_samples: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        keep_posterior: bool = False,
        sync: Sync = False,
        num_mc_groups: int = 1,
        shard: bool = False,
    ):
        arguments, chooses = locals(), lr is None
        if estimator not in ("price", "gradsq"):
            raise ValueError(f"estimator must be 'price' or 'gradsq', got {estimator!r}.")
        if shard and estimator == "gradsq":
            raise ValueError("shard must be off for estimator='gradsq', whose ranks need the gradients of all.")
        self.estimator: Estimator = estimator
        self.rescale_lr, self.keep_posterior = rescale_lr, keep_posterior
        self._loss_power = 1 if estimator == "price" else 2
        bound = math.inf
        if lr is None:
            hess_init, moves, bound = chosen_for_ivon(model, dataset_size, temperature, hess_init, weight_decay, LR)
            lr = moves * (1.0 if rescale_lr else hess_init + weight_decay)  # `rescale_lr` multiplies the step by that
        self._sites = {}
        self._new: set[nn.Parameter] = set()  # whose precision and prior no group has set yet
        beta2 = beta2 if beta2 is not None else BETA2 if chooses else 0.99999
        hess_init = 1.0 if hess_init is None else hess_init
        clip_radius = bound if clip_radius is None else clip_radius
        chosen = {"lr": lr, "beta2": beta2, "hess_init": hess_init, "clip_radius": clip_radius}
        options = Options.among(arguments, groups=with_plain_steps(groups or ()) if chooses else groups)
        super().__init__(model, dataset_size, _RULES, arguments | chosen, options)
        self._process_group = group_of(self._sharing) if estimator == "gradsq" and self.sync else None

    def _make_bayesian(self) -> None:
        """Convert nothing: parameters of any module get a posterior."""

    def _prepare(self) -> None:
        if not self._sites:
            self._new |= attach_missing(self.model, self.model.parameters())
        if next(posterior(self.model), None) is None:
            raise ValueError("model must have a parameter that requires a gradient, got none. Unfreeze what to train.")
        super()._prepare()

    def _all_groups(self, groups: Sequence[Mapping[str, Any]], deterministic_lr: float | None) -> list[dict[str, Any]]:
        everything = super()._all_groups(groups, deterministic_lr)
        # Without those of the frozen parameters, which a later add_param_group may add, once unfrozen.
        return [group for group in everything if any(p in self._sites for p in group["params"])]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model: of new layers, or unfrozen ones; each gets a posterior.

        Args:
            param_group: `params`, and any hyperparameter of their own.

        Raises:
            ValueError: If a value breaks its rule, a parameter is not the model's, or is in a group already.
        """
        parameters = listed(param_group["params"])
        self._new |= attach_missing(self.model, parameters)
        self._prepare()
        before = len(self.param_groups)
        super().add_param_group({**param_group, "params": parameters})
        for group in self.param_groups[before:]:
            if "prior_precision" in group:
                group["weight_decay"] = group["prior_precision"] / self._ess(group)
            for parameter in group["params"]:
                new = parameter.requires_grad and (parameter in self._new or not self.keep_posterior)
                if new and (site := self._sites.get(parameter)) and not site.prior_is_posterior:
                    site.prior_precision.fill_(self._ess(group) * group["weight_decay"])
                    site.precision.fill_(self._ess(group) * (group["hess_init"] + group["weight_decay"]))
            self._new -= set(group["params"])
            sites, ess = [self._sites[p] for p in group["params"] if p in self._sites], self._ess(group)
            group["hess_init"] = max(group["hess_init"], prior_hessian(sites, ess) - group["weight_decay"])

    def _scope(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        return self._sampler.draw(noise)

    def _record(self) -> Recorded | None:
        grads = {p: p.grad for p in self._names if p.grad is not None}
        if unknown := [self._names[parameter] for parameter in grads if parameter not in self._sites]:
            raise RuntimeError(
                f"parameter '{unknown[0]}' must have a posterior, got it unfrozen since. Pass it to add_param_group."
            )
        statistics = self._statistics_of(grads)
        if self.estimator == "gradsq" and len(self._sharing) > 1:
            self._gradients.append({p: p.grad.clone() for p in statistics if p.grad is not None})
        return Recorded(statistics) if statistics else None

    def _statistics_of(self, grads: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Return g (w - m) sqrt(p), where (w - m) sqrt(p) is the noise, or g^2, by parameter."""
        if self.estimator == "gradsq":
            return {parameter: grad.square() for parameter, grad in grads.items()}
        alone, shared = {}, {}
        for parameter in grads:
            noise, mine = self._sampler.take_noise(self._sites[parameter])
            (alone if mine else shared)[parameter] = noise
        found = {parameter: noise.mul_(grads[parameter]) for parameter, noise in alone.items()}
        if shared:
            values = torch._foreach_mul([grads[p] for p in shared], list(shared.values()))  # pyright: ignore
            found.update(zip(shared, values, strict=True))
        return {parameter: found[parameter] for parameter in grads}

    def _forget(self) -> None:
        super()._forget()
        self._planned = False  # the statistics have become the new precisions
        self._gradients: list[dict[nn.Parameter, Tensor]] = []  # of each draw, where ranks share it

    def _reduce(self, rows: Sequence[Row]) -> None:
        if self._forwards.reduced:  # with them the statistics, whose draw all ranks share
            return
        if self.estimator == "gradsq" and len(self._sharing) > 1:
            self._square_means(rows)
        if self.estimator == "price" or len(self._sharing) < len(rows):
            super()._reduce(rows)

    def _square_means(self, rows: Sequence[Row]) -> None:
        """Replace gradients and their squares by those of the mean over the ranks that share the draws."""
        weights = [rows[rank].numbers[0] for rank in self._sharing]
        parameters = [p for p in self._names if p.grad is not None]
        own = [[draw.get(p, p.new_zeros(p.shape)) for p in parameters] for draw in self._gradients]
        draws = own or [[torch.zeros_like(p) for p in parameters] for _ in range(int(rows[0].numbers[1]))]
        share = self._averages.weight / (sum(weights) or 1.0)
        norms = statistics_of_norms(self.model) if len(self._sharing) == len(rows) else []
        weighted_sum([*(g for draw in draws for g in draw), *norms], share, self._wire, self._process_group)
        for parameter, *gradients in zip(parameters, *draws, strict=True):
            parameter.grad = torch.stack(gradients).mean(0)
            self._averages.statistics[parameter] = torch.stack(gradients).square_().mean(0)

    def _plan(self) -> None:
        """Compute the new precisions, which must be finite in all groups."""
        self._planned = True
        pairs = [(bundle, group) for group in self.param_groups for bundle in self._bundles(group)]
        sums = [self._new_precision(bundle, group).sum() for bundle, group in pairs]
        if sums and not torch.stack(sums).isfinite().all():
            refuse_new_precisions((each for group in self.param_groups for each in self._bundles(group)), self._names)

    def _new_precision(self, bundle: Bundle, group: Mapping[str, Any]) -> Tensor:
        ess, of_root = self._ess(group), self.estimator == "price"
        return bundle.new_precision(ess * self._averages.scale * (1 if of_root else ess), 1 - group["beta2"], of_root)

    def _posterior_bound(self, group: dict[str, Any], readings: Readings) -> Callable[[], float]:
        moving = self._bundles(group)
        precisions, statistics = [each.precision for each in moving], [each.statistic for each in moving]
        bounds = NaturalBounds(readings, moving, precisions, precisions, statistics)

        def bound() -> float:
            (precision, statistic), least, ess = bounds.others(), bounds.least(), self._ess(group)
            factor = ess * self._averages.scale * (math.sqrt(precision) if self.estimator == "price" else ess)
            target = bounds.prior() + max(1.0, factor) * statistic
            moved = bounds.reach(ess, self._lr(group), least / 2)  # the new precision is at least p / 2
            moved += retracted_bound(precision, least, target, 1 - group["beta2"])
            return moved + self._factor() * (bounds.gradient() + statistic)

        return bound

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        new_precisions = [each.statistic for each in self._bundles(group)]
        return NaturalBounds(Readings(), self._bundles(group), new_precisions).reach(self._ess(group), self._lr(group))

    def _lr(self, group: Mapping[str, Any]) -> float:
        return group["lr"] * (group["hess_init"] + group["weight_decay"] if self.rescale_lr else 1.0)

    def _update(self, group: dict[str, Any]) -> None:
        for bundle in self._bundles(group):
            newest = bundle.count(group["beta1"])
            if not self._planned:
                self._new_precision(bundle, group)
            numbers = {"ess": self._ess(group), "lr": self._lr(group), "clip_radius": group["clip_radius"]}
            if bundle.step_by_kernel(newest, **numbers):
                continue
            for piece in bundle.pieces():
                piece.precision.copy_(piece.statistic)
                prior = {"prior_mean": piece.prior_mean, "prior_precision": piece.prior_precision}
                mean_step_(piece.mean, piece.precision, piece.average(newest), piece.statistic, **prior, **numbers)
                piece.write()
