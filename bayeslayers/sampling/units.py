"""What a tracker follows: layers with a curvature rule, and parameters that modules read themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bayeslayers.curvature.watch import AS_WEIGHT
from bayeslayers.layers import BayesianLayer
from bayeslayers.sampling.ordinary import is_read
from bayeslayers.sampling.sites import Site

# Modules that hand their parameters to one fused op, which cannot tell the examples apart.
FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that own or share an uncertain parameter, by name.

    Args:
        model: Any model.
    """
    modules = dict(model.named_modules())
    uncertain = _uncertain(modules.values())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, BayesianLayer) or not uncertain.isdisjoint(module._parameters.values())
    }


def layers_with_curvature(sites: Iterable[Site]) -> dict[str, nn.Module]:
    """Return the modules of some sites by name, where the curvature of each site can be tracked.

    Args:
        sites: The uncertain tensors.

    Raises:
        ValueError: If a layer's rule does not cover its parameter, or a module computes with it in a fused op.
    """
    layers: dict[str, nn.Module] = {}
    for site in sites:
        for name, (module, key) in zip(site.names, site.places, strict=True):
            kind = type(module).__name__
            if isinstance(module, BayesianLayer) and key not in (covered := module.covered(module)):
                raise ValueError(
                    f"parameter '{name}' must be covered by its layer's curvature rule, got a {kind}, whose rule "
                    f"covers {', '.join(covered)}. Use IVON."
                )
            if not isinstance(module, BayesianLayer) and isinstance(module, (*FUSED, torch.jit.ScriptModule)):
                raise ValueError(
                    f"parameter '{name}' must be of a layer with a curvature rule, or be read by its module itself, "
                    f"got a {kind}. Use IVON."
                )
            layers[name.rpartition(".")[0]] = module
    return layers


def parameter_names(layers: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Return one name for each parameter of some modules: of several, that beside which the precision is.

    Args:
        layers: Modules by name.
    """
    names: dict[nn.Parameter, str] = {}
    for owns in (True, False):
        for path, module in layers.items():
            for key, parameter in module._parameters.items():
                if parameter is not None and (f"{key}_precision" in module._buffers) == owns:
                    names.setdefault(parameter, f"{path}.{key}" if path else key)
    return names


def reads_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the uncertain parameters that are read as attributes, by name, with their modules and names there.

    Args:
        layers: Modules by name.
    """
    uncertain = _uncertain(layers.values())
    return {
        f"{path}.{key}" if path else key: (module, key)
        for path, module in layers.items()
        if is_read(module)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter in uncertain
    }


def groups_of(layers: Mapping[str, nn.Module], reads: Mapping[str, tuple[nn.Module, str]]) -> dict[str, str]:
    """Return for each layer or read that shares a parameter with others the first of these.

    Args:
        layers: Modules by name.
        reads: What `reads_of` returns.
    """
    users: dict[nn.Parameter, dict[str, list[str]]] = {}  # by owner, its ops
    for path, layer in layers.items():
        for op, (_, keys) in layer.ops(layer).items() if isinstance(layer, BayesianLayer) else ():
            for parameter in [layer._parameters.get(key) for key in keys if key is not None]:
                if parameter is not None:
                    users.setdefault(parameter, {}).setdefault(path, []).append(".".join(filter(None, (path, op))))
    for name, (module, key) in reads.items():
        value: Any = module._parameters[key]
        users.setdefault(value, {}).setdefault(f"{name} where it is read", []).append(name)
    groups: dict[str, str] = {}
    for owners in users.values():
        names = [name for several in owners.values() for name in several]
        if len(owners) > 1:
            joined, first = {groups.get(name, name) for name in names}, groups.get(names[0], names[0])
            groups |= {name: first for name, group in groups.items() if group in joined}
            groups |= dict.fromkeys(names, first)
    for name in reads:  # which an op may take as its weight too
        groups[name + AS_WEIGHT] = groups.setdefault(name, name)
    return groups


def _uncertain(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that have a precision beside them in one of the modules."""
    return {
        parameter
        for module in modules
        for key, parameter in module._parameters.items()
        if parameter is not None and f"{key}_precision" in module._buffers
    }
