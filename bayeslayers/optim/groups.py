"""The parameter groups of a posterior: what is uncertain in a model, with which hyperparameters and priors."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import did_you_mean, network, positive, size
from bayeslayers.convert.conversion import to_bayesian
from bayeslayers.convert.in_place import unchanged_on_error, warn_of_deterministic
from bayeslayers.convert.report import ConversionReport, report_of
from bayeslayers.layers import BayesianLayer, attach_posterior
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import refuse_replicas, refuse_sharded_parameters
from bayeslayers.sampling import Sampler, Site, posterior, sites_of
from bayeslayers.sampling.flat import Scratch

Rules = Mapping[str, Callable[[str, Any], Any]]  # per hyperparameter the check that returns its value

_OTHER_KEYS = ("beta2", "initial_lr", "initial_temperature")  # Adam's, and what schedules leave in a group


class PosteriorGroups(torch.optim.Optimizer, abc.ABC):
    """Base of optimisers whose groups are those of a model's uncertain and deterministic parameters, apart.

    `group["kind"]` is "bayesian" or "deterministic". A group may have hyperparameters of its own, and a
    `prior_precision`, which is written to the layers. A prior that is an earlier posterior stays.

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        rules: The check of each hyperparameter of a group, `lr` among them.
        values: Their values, among others.
        options: What else the user has chosen.
    """

    _keeps_noise: ClassVar[bool] = False  # of a sample, after it
    _adam_lr: float | None = None  # of deterministic parameters in groups without an lr; None for that of the others

    def __init__(self, model: nn.Module, dataset_size: int, rules: Rules, values: Mapping[str, Any], options: Options):
        network("model", model)
        refuse_replicas(model)
        refuse_sharded_parameters(model)
        self.model = model
        self.dataset_size = size("dataset_size", dataset_size)
        self._rules = {**rules, "prior_precision": positive}
        checked = {name: rule(name, values[name]) for name, rule in rules.items()}
        init_precision: Any = options.init_precision
        if init_precision is not None:
            positive("init_precision", init_precision)
        if options.deterministic_lr is not None:
            rules["lr"]("deterministic_lr", options.deterministic_lr)
        self._generator = options.generator
        with unchanged_on_error(model):
            self._converted = self._make_bayesian()
            self._prepare()
            groups = self._all_groups(options.groups or (), options.deterministic_lr)
            super().__init__(groups, {"beta2": 0.999, **checked})
            if self._converted is not None:
                warn_of_deterministic(self._converted)
        self._fill(options.prior_precision, init_precision)

    def _fill(self, prior_precision: float | None, init_precision: float | None) -> None:
        """Write the precisions that the user has given to the layers, but for priors of groups of their own."""
        for site in self._sites.values():
            if prior_precision is not None and not self._has_own_prior(site) and not site.prior_is_posterior:
                site.prior_precision.fill_(prior_precision)
            if init_precision is not None:
                site.precision.fill_(init_precision)
        if init_precision is not None:
            self._drop_roots()

    def _begin_again_after_new_prior(self) -> None:
        """Drop momentum and step counts of the task before, where `posterior_to_prior` has begun another."""
        versions = self._versions_of_prior()
        if versions != self._prior_versions:
            self._prior_versions = versions
            self._forget_steps()

    def _versions_of_prior(self) -> list[int]:
        return [vars(module).get("prior_version", 0) for module in self._modules]

    def _forget_steps(self) -> None:
        """Drop what the steps so far have left, beside the posterior."""
        self.state.clear()

    @property
    def report(self) -> ConversionReport:
        """Which parameters of the model are Bayesian, and why the others are not."""
        return self._converted or report_of(self.model)

    def _make_bayesian(self) -> ConversionReport | None:
        """Convert a model without any posterior in place, and report; leave any other as it is."""
        return None if any(True for _ in posterior(self.model)) else to_bayesian(self.model, inplace=True)[1]

    def _prepare(self) -> None:
        """Find the uncertain tensors of the model and all its parameters, at the start and when it has changed."""
        sites = sites_of(self.model)
        devices = sorted({str(tensor.device) for tensor in self.model.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"model must be on one device, got parameters on {' and '.join(devices)}. Move it by to()."
            )
        if self._generator is not None and self._generator.device.type != torch.device(devices[0]).type:
            raise ValueError(f"generator must be on the model's device {devices[0]}, got {self._generator.device}.")
        self._sites: dict[nn.Parameter, Site] = {site.mean: site for site in sites}
        self._names = {parameter: name for name, parameter in self.model.named_parameters()}
        self._sampler = Sampler(sites, self._generator, keeps_noise=self._keeps_noise)
        self._modules = list(dict.fromkeys(site.module for site in sites))
        self._prior_versions = self._versions_of_prior()
        self._scratch = Scratch()

    def _all_groups(self, groups: Sequence[Mapping[str, Any]], deterministic_lr: float | None) -> list[dict[str, Any]]:
        """Return the given groups, and behind them the rest of the parameters in groups of each kind."""
        given = [{**group, "params": listed(group["params"])} for group in groups]
        taken = {parameter for group in given for parameter in group["params"]}
        rest = [p for p in self.model.parameters() if p not in taken]
        uncertain, others = [p for p in rest if p in self._sites], [p for p in rest if p not in self._sites]
        own = {} if deterministic_lr is None else {"lr": deterministic_lr}
        return [*given, *({"params": p} for p in [uncertain] if p), *({"params": p, **own} for p in [others] if p)]

    def _drop_roots(self) -> None:
        """Leave matrix-variate posteriors the precisions of their entries, which this method moves."""
        for module in self._modules:
            if isinstance(module, BayesianLayer) and module.is_correlated:
                module.drop_roots()

    def _has_own_prior(self, site: Site) -> bool:
        return any("prior_precision" in group and site.mean in set(group["params"]) for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, those of layers that it has got since included.

        Args:
            param_group: `params`, and any hyperparameter of their own. Uncertain and deterministic
                parameters become a group each. `prior_precision` is written to the layers.

        Raises:
            ValueError: If a value breaks its rule, a parameter is not the model's, or is in a group already.
        """
        group = dict(param_group)
        parameters = listed(group.pop("params"))
        known = {*self._rules, *_OTHER_KEYS}
        if unknown := sorted(group.keys() - known):
            raise ValueError(
                f"a parameter group must have keys among params, {', '.join(self._rules)}, got {unknown[0]!r}."
                f"{did_you_mean(unknown[0], self._rules)}"
            )
        for name in self._rules.keys() & group.keys():
            self._rules[name](name, group[name])
        if any(parameter not in self._names for parameter in parameters):
            self._prepare()
        if strange := [tuple(p.shape) for p in parameters if p not in self._names]:
            raise ValueError(f"params must be parameters of the model, got one of shape {strange[0]} that is none.")
        for kind in ("bayesian", "deterministic"):
            if members := [p for p in parameters if (p in self._sites) == (kind == "bayesian")]:
                own = {} if kind == "bayesian" or self._adam_lr is None else {"lr": self._adam_lr}
                super().add_param_group({**own, **group, "params": members, "kind": kind})
        if "prior_precision" in group:
            for parameter in parameters:
                if (site := self._sites.get(parameter)) and not site.prior_is_posterior:
                    site.prior_precision.fill_(group["prior_precision"])

    def _ess(self, group: Mapping[str, Any]) -> float:
        """Return the effective sample size, N / T."""
        return self.dataset_size / group["temperature"]


def listed(params: Any) -> list[Any]:
    """Return the parameters of a group, which may be one tensor."""
    return [params] if isinstance(params, Tensor) else list(params)


def attach_missing(model: nn.Module, parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Give those parameters a posterior that require a gradient and have none, and return them.

    Args:
        model: The model that they belong to.
        parameters: Some of its parameters.
    """
    missing = {p for p in parameters if p.requires_grad} - {site.mean for site in posterior(model)}
    found: set[nn.Parameter] = set()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in missing:
                attach_posterior(module, 1.0, 1.0, [key])
                missing.remove(parameter)
                found.add(parameter)
    return found
