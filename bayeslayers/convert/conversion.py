"""One-call conversion: an ordinary network to Bayesian layers, in place or as a copy, and back."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from bayeslayers.checks import network, positive
from bayeslayers.convert.counterparts import COUNTERPARTS
from bayeslayers.convert.in_place import unchanged_on_error
from bayeslayers.convert.other_libraries import bayesian_class_of
from bayeslayers.convert.readers import readers_of, turn_off_fast_paths
from bayeslayers.convert.report import ConversionReport, Status, entry_of
from bayeslayers.convert.reroute import ReroutedLayer, bayesian_subclass, obstacle
from bayeslayers.convert.selection import Selectors, select
from bayeslayers.curvature.rule import rule_of
from bayeslayers.layers import (
    DEFAULT_INIT_PRECISION,
    DEFAULT_PRIOR_PRECISION,
    POSTERIOR_SUFFIXES,
    STRUCTURE,
    BayesianLayer,
)
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

    Returns:
        The converted network (`module` itself if `inplace`) and the report.

    Raises:
        ValueError: If a selector matches nothing or only a part of a layer, a precision is not
            positive, a parameter has no shape yet, or nothing can be converted.

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
    return counterpart


def _convert_network(
    net: nn.Module,
    include: Selectors | None,
    exclude: Selectors | None,
    prior_precision: float,
    init_precision: float,
) -> ConversionReport:
    """Convert the layers of a network in place, and report."""
    reasons = _reasons_against(net, include, exclude)
    report = _report(net, reasons)
    if not report.totals["converted"]:
        found = "; ".join(f"'{entry.name}': {entry.reason}" for entry in report.entries[:3]) or "no parameters"
        raise ValueError(
            f"the model must have a layer that can become Bayesian, got none. {found}. IVON makes any parameter "
            "Bayesian."
        )
    for layer in list(net.modules()):
        if layer not in reasons and _bayesian_class(type(layer)) is not None:
            _convert(layer, prior_precision, init_precision)
    turn_off_fast_paths(net)
    return report


def _bayesian_class(kind: type[nn.Module]) -> type[BayesianLayer] | None:
    """Return the Bayesian version of a class of layers, None if it or its bases have no rule."""
    if issubclass(kind, BayesianLayer):
        return None
    base = next((base for base in kind.__mro__ if base in _RULES), None)
    if base is None:
        return bayesian_class_of(kind)
    if base is kind:
        return _RULES[kind]
    return bayesian_subclass(kind, base, _RULES[base])


def _convert(layer: Any, prior_precision: float, init_precision: float) -> None:
    """Change a layer's class, which keeps its tensors, hooks and places in the network, and add its posterior."""
    kind: Any = _bayesian_class(type(layer))
    layer.__class__ = kind
    layer.attach_posterior(prior_precision, init_precision)


def _reasons_against(net: nn.Module, include: Selectors | None, exclude: Selectors | None) -> dict[nn.Module, str]:
    """Return the modules that own parameters and stay as they are, with the reason."""
    included = None if include is None else select(net, include, "include", _is_layer)
    excluded = set() if exclude is None else select(net, exclude, "exclude", _is_layer)
    tied, readers = _tied(net), readers_of(net)
    reasons = {}
    for module in net.modules():
        if isinstance(module, BayesianLayer) or not any(True for _ in module.parameters(recurse=False)):
            continue
        if module in excluded:
            reasons[module] = "excluded"
        elif included is not None and module not in included:
            reasons[module] = "not included"
        elif module in readers:
            reasons[module] = (
                f"{readers[module]} reads it without calling its layer, so no sample of the layer would count"
            )
        elif any(parameter in tied for parameter in module.parameters(recurse=False)):
            reasons[module] = "its layer has a tensor in common with another"
        elif reason := _obstacle(module):
            reasons[module] = reason
        if module in reasons and isinstance(module, nn.MultiheadAttention):
            readers[module.out_proj] = type(module).__name__  # whose weight it reads unless it is Bayesian
    return reasons


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, BayesianLayer) or _bayesian_class(type(module)) is not None


def _obstacle(module: nn.Module) -> str | None:
    """Return what is in the way of converting a module, None if nothing is."""
    kind = type(module).__name__
    own = {key for key, _ in module.named_parameters(recurse=False)}
    bayesian = _bayesian_class(type(module))
    if bayesian is None:
        return f"a parameter of {kind} itself, for which there is no Bayesian layer"
    if isinstance(module, _OF_SEVERAL_OPS) and issubclass(bayesian, ReroutedLayer):
        return f"the forward of {kind} is its own, for which there is no curvature rule"
    for name in bayesian.covered(module):
        if name not in module._parameters and getattr(module, name, None) is not None:
            return f"the {name} of this {kind} is computed from other tensors"
    if extra := own - set(bayesian.covered(module)):
        return f"this {kind} has a parameter '{min(extra)}' too, for which there is no curvature rule"
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced"
    for option in ("max_norm", "scale_grad_by_freq", "sparse") if isinstance(module, nn.Embedding) else ():
        if getattr(module, option):
            return f"{option} is on, which no posterior has a meaning for"
    return obstacle(module, bayesian)


def _tied(net: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the parameters that several modules own, with all of their names."""
    names = defaultdict(list)
    for path, module in net.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names[parameter].append(f"{path}.{key}" if path else key)
    return {parameter: several for parameter, several in names.items() if len(several) > 1}


def _report(net: nn.Module, reasons: dict[nn.Module, str]) -> ConversionReport:
    """Return the report of a network that is to be converted but for the modules with a reason."""
    tied = _tied(net)
    paths, owner = defaultdict(list), {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths[module].append(path)
        owner |= {parameter: module for parameter in module.parameters(recurse=False) if parameter not in owner}
    entries = []
    for name, parameter in net.named_parameters():
        module = owner[parameter]
        status: Status = "converted" if module not in reasons else "deterministic"
        notes = [reasons[module]] if module in reasons else []
        if parameter in tied:
            status, notes = "tied", [f"one tensor of several names: {', '.join(tied[parameter])}"]
        if status == "converted" and isinstance(module, BayesianLayer):
            notes.append("was Bayesian before")
        if status == "converted" and len(paths[module]) > 1:
            notes.append(f"one layer in several places: {', '.join(paths[module])}")
        bayesian: Any = type(module) if isinstance(module, BayesianLayer) else _bayesian_class(type(module))
        if status == "converted" and "" not in bayesian.ops(module):
            notes.append("diagonal under K-FAC")
        entries.append(entry_of(name, parameter, status, notes))
    return ConversionReport(tuple(entries))
