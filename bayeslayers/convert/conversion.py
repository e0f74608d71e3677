"""One-call conversion: an ordinary network to Bayesian layers, in place or as a copy, and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from bayeslayers.checks import network, positive
from bayeslayers.convert.counterparts import COUNTERPARTS
from bayeslayers.convert.in_place import unchanged_on_error
from bayeslayers.convert.other_libraries import bayesian_class_of
from bayeslayers.convert.outcome import is_scale_of_norm, names_of, plain_keys, report_of_conversion, with_ties
from bayeslayers.convert.readers import readers_of, turn_off_fast_paths
from bayeslayers.convert.report import ConversionReport
from bayeslayers.convert.reroute import ReroutedLayer, bayesian_subclass, obstacle
from bayeslayers.convert.selection import Selectors, select
from bayeslayers.convert.trial import refusals_of
from bayeslayers.curvature.rule import rule_of
from bayeslayers.layers import (
    DEFAULT_INIT_PRECISION,
    DEFAULT_PRIOR_PRECISION,
    POSTERIOR_SUFFIXES,
    STRUCTURE,
    BayesianLayer,
    attach_posterior,
)
from bayeslayers.layers.linear import REWRITING
from bayeslayers.sampling import posterior
from bayeslayers.unwrap import unwrapped

Network = TypeVar("Network", bound=nn.Module)

_RULES = dict(COUNTERPARTS)

# Modules of several ops: another forward does something else with their tensors.
_OF_SEVERAL_OPS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def register_rule(ordinary: type[nn.Module], bayesian: type[BayesianLayer]) -> None:
    """Let `to_bayesian` turn layers of one class, and of its subclasses, into those of another.

    Args:
        ordinary: Class of the ordinary layer.
        bayesian: A `BayesianLayer` derived from it, whose `rule` (a `CurvatureRule`) names the layer's parameters, and
            whose forward computes with the drawn ones, as `BayesianLayer.compute` gives them.

    Raises:
        TypeError: If one of them is no class of layers, `bayesian` is not derived from both `BayesianLayer` and
            `ordinary`, names no curvature rule, or has the forward of `ordinary`.
    """
    for argument, kind in (("ordinary", ordinary), ("bayesian", bayesian)):
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"{argument} must be a class of layers, got {kind!r}.")
    if not (issubclass(bayesian, BayesianLayer) and issubclass(bayesian, ordinary)):
        raise TypeError(
            f"bayesian must be a BayesianLayer derived from {ordinary.__name__}, got {bayesian.__name__}: a converted "
            "layer keeps its attributes and changes its class."
        )
    rule_of(bayesian)
    if bayesian.forward is ordinary.forward:
        raise TypeError(
            f"bayesian must compute with the drawn parameters, got {bayesian.__name__} with the forward of "
            f"{ordinary.__name__}. Give it a forward of its own, as `return self.compute(input)`."
        )
    _RULES[ordinary] = bayesian


def to_bayesian(
    module: Network,
    include: Selectors | None = None,
    exclude: Selectors | None = None,
    prior_precision: float = DEFAULT_PRIOR_PRECISION,
    init_precision: float = DEFAULT_INIT_PRECISION,
    inplace: bool = False,
    example_inputs: Any = None,
) -> tuple[Network, ConversionReport]:
    """Give a network Bayesian layers, in a copy or in place, and report on every parameter tensor.

    The weights become the means. All else stays: buffers, train or eval mode, dtype, device, hooks,
    `requires_grad`; a layer used in two places is still one layer. What cannot be converted exactly
    stays as it is, with the reason in the report; the optimisers train it too.

    A layer is converted by changing its class and adding buffers. In place, the modules and parameters are
    therefore the same objects as before, and wrappers, optimisers, schedulers and hooks that hold them stay
    valid. In a model that torch wraps (`DistributedDataParallel`, `DataParallel`, `AveragedModel`,
    `torch.compile`) the network inside is converted; selectors and the report name its modules.

    A selector is a name pattern as in a shell (`"fc"`, `"layer4*"`), a class of modules
    (`nn.BatchNorm2d`), a function such as `last_layer` or `norms`, or an iterable of selectors. It
    selects modules with all that is inside them.

    Args:
        module: Ordinary network, also in torch's wrappers.
        include: What to convert; None for everything.
        exclude: What to leave as it is.
        prior_precision: Precision of every prior, > 0.
        init_precision: Precision of the posterior at the start, > 0.
        inplace: Convert `module` itself, in place of a copy. If the conversion raises, it is left as it was.
        example_inputs: A batch of two examples or more, as `bl.predict` takes it: a tensor, `Inputs`, a mapping or a
            tuple. A copy of the network then runs forward and backward on it, and `report.refusals` lists every layer
            that a step of VOGN would refuse. None for no such trial.

    Returns:
        The converted network (`module` itself if `inplace`) and the report.

    Raises:
        ValueError: If a selector matches nothing or only a part of a layer, a precision is not
            positive, a parameter has no shape yet, nothing can be converted, or a trial is not possible with
            `example_inputs`.

    Example:
        >>> from torch import nn
        >>> import bayeslayers as bl
        >>> ordinary = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> net, report = bl.to_bayesian(ordinary)
        >>> net[3], report.coverage
        (BayesLinear(in_features=8, out_features=2, bias=True), 1.0)
        >>> net, report = bl.to_bayesian(ordinary, exclude=bl.norms)
        >>> report.totals
        {'converted': 58, 'deterministic': 16, 'tied': 0}
    """
    network("module", module)
    positive("prior_precision", prior_precision)
    positive("init_precision", init_precision)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"the model must know the shapes of its parameters, '{name}' has none. Call it once on an example."
            )
    converted = module if inplace else copy.deepcopy(module)
    with unchanged_on_error(converted):
        report = _convert_network(unwrapped(converted), include, exclude, prior_precision, init_precision)
        if example_inputs is not None:
            report = replace(report, refusals=refusals_of(unwrapped(converted), example_inputs))
    return converted, report


def to_deterministic(net: Network) -> Network:
    """Return the deterministic counterpart of a network: a copy with torch.nn layers, whose weights are the means.

    In eval mode its outputs are those of a plain call of `net`, bit for bit.

    Args:
        net: Network with Bayesian layers, left as it is.

    Raises:
        TypeError: If a Bayesian layer is of a class without a rule.
    """
    counterpart = copy.deepcopy(net)
    for site in list(posterior(counterpart)):
        for suffix in POSTERIOR_SUFFIXES if not isinstance(site.module, BayesianLayer) else ():
            delattr(site.module, site.key + suffix)
    ordinary = {bayesian: kind for kind, bayesian in _RULES.items()}
    bayesian_layers = {name: m for name, m in counterpart.named_modules() if isinstance(m, BayesianLayer)}
    layer: Any
    for name, layer in bayesian_layers.items():
        kind = getattr(layer, "ordinary", None) or ordinary.get(type(layer))
        if kind is None:
            raise TypeError(
                f"layer '{name}' must be of a class with a rule, got {type(layer).__name__}. register_rule adds one."
            )
        for key in list(layer._buffers):
            if key.endswith(POSTERIOR_SUFFIXES) or key in STRUCTURE:
                delattr(layer, key)
        layer.__class__ = kind
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()  # a list that the Bayesian layer does not keep
        for flag in ("is_read", "shares"):
            vars(layer).pop(flag, None)
    return counterpart


def _convert_network(
    net: nn.Module,
    include: Selectors | None,
    exclude: Selectors | None,
    prior_precision: float,
    init_precision: float,
) -> ConversionReport:
    """Convert the layers of a network in place, and the parameters that modules read themselves; and report."""
    reasons, readers = _reasons_against(net, include, exclude), readers_of(net)
    report = report_of_conversion(net, reasons, _bayesian_class)
    if not report.totals["converted"]:
        found = "; ".join(f"'{entry.name}': {entry.reason}" for entry in report.entries[:3]) or "no parameters"
        raise ValueError(
            f"the model must have a layer that can become Bayesian, got none. {found}. IVON makes any parameter "
            "Bayesian."
        )
    tied, have = {p for p, several in names_of(net).items() if len(several) > 1}, set[nn.Parameter]()
    for module in list(net.modules()):
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if module not in reasons and not isinstance(module, BayesianLayer) and own:
            keys = [key for key in plain_keys(module, reasons) if own[key] not in have]
            _convert(module, keys, prior_precision, init_precision)
            if isinstance(module, BayesianLayer):
                vars(module).update({"is_read": True} if module in readers else {})
                vars(module).update({"shares": True} if not tied.isdisjoint(own.values()) else {})
            have |= set(own.values())
    turn_off_fast_paths(net)
    return report


def _convert(module: Any, keys: Sequence[str], prior_precision: float, init_precision: float) -> None:
    """Change a layer's class, which keeps its tensors, hooks and places in the network, and add posteriors."""
    kind: Any = _bayesian_class(type(module))
    if kind is not None:
        module.__class__ = kind
    missing = [key for key in keys if f"{key}_precision" not in module._buffers]
    attach_posterior(module, prior_precision, init_precision, missing)
    for key in missing if kind is None else ():
        if is_scale_of_norm(module, key):
            module.get_buffer(f"{key}_prior_mean").fill_(1.0)


def _bayesian_class(kind: type[nn.Module]) -> type[BayesianLayer] | None:
    """Return the Bayesian version of a class of layers, None if it or its bases have no rule."""
    if issubclass(kind, BayesianLayer):
        return None
    if (known := bayesian_class_of(kind)) is not None:
        return known
    if (base := next((base for base in kind.__mro__ if base in _RULES), None)) is None:
        return None
    if base is kind:
        return _RULES[kind]
    return bayesian_subclass(kind, base, _RULES[base])


def _reasons_against(
    net: nn.Module, include: Selectors | None, exclude: Selectors | None
) -> dict[nn.Module | nn.Parameter, str]:
    """Return the modules and single parameters that stay as they are, with the reason."""
    included = None if include is None else select(net, include, "include", _is_layer)
    excluded = set() if exclude is None else select(net, exclude, "exclude", _is_layer)
    reasons: dict[nn.Module | nn.Parameter, str] = {}
    for module in net.modules():
        own = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, BayesianLayer) or not own:
            continue
        if module in excluded:
            reasons[module] = "excluded"
        elif included is not None and module not in included and included.isdisjoint(own):
            reasons[module] = "not included"
        elif reason := _obstacle(module):
            reasons[module] = reason
        if module in reasons and isinstance(module, nn.MultiheadAttention):
            reasons[module.out_proj] = (
                f"{type(module).__name__} reads it without calling its layer, so no sample of the layer would count"
            )
        for parameter in own if module not in reasons else ():
            if parameter in excluded:
                reasons[parameter] = "excluded"
            elif included is not None and module not in included and parameter not in included:
                reasons[parameter] = "not included"
            elif not parameter.is_floating_point():
                reasons[parameter] = f"it is of {parameter.dtype}, not of real numbers"
    return with_ties(reasons, net)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, BayesianLayer) or _bayesian_class(type(module)) is not None


def _obstacle(module: nn.Module) -> str | None:
    """Return what is in the way of converting a module, None if nothing is."""
    kind = type(module).__name__
    own = {key for key, _ in module.named_parameters(recurse=False)}
    bayesian = _bayesian_class(type(module))
    if isinstance(module, ParametrizationList | LazyModuleMixin | torch.jit.ScriptModule):
        return f"a parameter of {kind}, from which another tensor is computed"
    if bayesian is None:
        return None  # its module reads it itself
    if isinstance(module, _OF_SEVERAL_OPS) and issubclass(bayesian, ReroutedLayer):
        return f"the forward of {kind} is its own, for which there is no curvature rule"
    for name in bayesian.covered(module):
        if name not in module._parameters and getattr(module, name, None) is not None:
            return f"the {name} of this {kind} is computed from other tensors"
    if extra := own - set(bayesian.covered(module)):
        return f"this {kind} has a parameter '{min(extra)}' too, for which there is no curvature rule"
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced"
    for option in REWRITING if isinstance(module, nn.Embedding | nn.EmbeddingBag) else ():
        if getattr(module, option):
            return f"{option} is on, which no posterior has a meaning for"
    return obstacle(module, bayesian)
