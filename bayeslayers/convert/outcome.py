"""What becomes of each parameter of a network in a conversion: modules, ties between them, and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bayeslayers.convert.report import ConversionReport, Status, entry_of
from bayeslayers.layers import BayesianLayer

Reasons = Mapping[nn.Module | nn.Parameter, str]  # why modules, or single parameters, stay as they are


def names_of(net: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Return the modules that own each parameter of a network, each with a full name of the parameter.

    Args:
        net: Network.
    """
    owners = defaultdict(list)
    for path, module in net.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, f"{path}.{key}" if path else key))
    return dict(owners)


def plain_keys(module: nn.Module, reasons: Reasons) -> list[str]:
    """Return the names of the parameters that a module, which is no layer, reads itself and that become Bayesian.

    Args:
        module: The module.
        reasons: Why some stay as they are.
    """
    own = {key: p for key, p in module._parameters.items() if p is not None}
    return [key for key, p in own.items() if p.is_floating_point() and p not in reasons]


def is_scale_of_norm(module: nn.Module, key: str) -> bool:
    """Return whether a parameter is the scale of a norm of its own class, which is 1 before training.

    Args:
        module: Module that owns it.
        key: Its name there.
    """
    parameter = module._parameters[key]
    if parameter is None or "Norm" not in type(module).__name__ or key not in ("weight", "scale"):
        return False
    return bool(torch.as_tensor(parameter.detach().mean()) > 0.5)  # some scale by 1 + weight


def report_of_conversion(net: nn.Module, reasons: Reasons, class_of: Callable[[type], Any]) -> ConversionReport:
    """Return the report of a network that is to be converted but for what has a reason.

    Args:
        net: Network.
        reasons: Why some modules or parameters stay as they are.
        class_of: Returns the Bayesian version of a class of layers, None if there is none.
    """
    owners = names_of(net)
    paths = defaultdict(list)
    for path, module in net.named_modules(remove_duplicate=False):
        paths[module].append(path)
    entries = []
    for name, parameter in net.named_parameters():
        found = [reasons[x] for module, _ in owners[parameter] for x in (module, parameter) if x in reasons]
        module, status = owners[parameter][0][0], "converted"
        notes = found[:1]
        if found:
            status: Status = "deterministic"
        if len(owners[parameter]) > 1:
            names = ", ".join(each for _, each in owners[parameter])
            status = "tied" if found else status
            notes = [f"one tensor of several names: {names}", *(notes if found else [])]
        if status == "converted" and isinstance(module, BayesianLayer):
            notes.append("was Bayesian before")
        if status == "converted" and len(paths[module]) > 1:
            notes.append(f"one layer in several places: {', '.join(paths[module])}")
        bayesian = type(module) if isinstance(module, BayesianLayer) else class_of(type(module))
        if status == "converted" and bayesian is not None and "" not in bayesian.ops(module):
            notes.append("diagonal under K-FAC")
        entries.append(entry_of(name, parameter, status, notes))
    return ConversionReport(tuple(entries))


def with_ties(reasons: dict[nn.Module | nn.Parameter, str], net: nn.Module) -> dict[nn.Module | nn.Parameter, str]:
    """Return the reasons, of which those of a tensor of several modules hold for all of them.

    Args:
        reasons: Why some modules or parameters of a network stay as they are.
        net: The network.
    """
    shared = [[module for module, _ in several] for several in names_of(net).values() if len(several) > 1]
    pending = True
    while pending:
        pending = False
        for modules in shared:
            for module in modules if any(m in reasons for m in modules) else ():
                if module not in reasons and not isinstance(module, BayesianLayer):
                    reasons[module], pending = "its layer has a tensor in common with another", True
    return reasons
