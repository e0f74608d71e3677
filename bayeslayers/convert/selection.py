"""Selectors: which modules of a network are meant, by name, by class or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bayeslayers.checks import did_you_mean
from bayeslayers.layers import FilterResponseNorm2d

Selector: TypeAlias = str | type[nn.Module] | Callable[[Mapping[str, nn.Module]], Iterable[str]]
Selectors: TypeAlias = Selector | Iterable[Selector]


def last_layer(modules: Mapping[str, nn.Module]) -> list[str]:
    """Select the last linear layer or convolution, in order of definition: the output of most networks.

    Args:
        modules: Modules by path.
    """
    return [path for path, module in modules.items() if isinstance(module, nn.Linear | _ConvNd)][-1:]


def norms(modules: Mapping[str, nn.Module]) -> list[str]:
    """Select the normalisation layers.

    Args:
        modules: Modules by path.
    """
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, FilterResponseNorm2d)
    return [path for path, module in modules.items() if isinstance(module, kinds) or _is_norm_by_name(module)]


def _is_norm_by_name(module: nn.Module) -> bool:
    """Return whether a module is a norm of its own class, as an `RMSNorm`."""
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def select(
    net: nn.Module, selectors: Selectors, argument: str, is_layer: Callable[[nn.Module], bool]
) -> set[nn.Module | nn.Parameter]:
    """Return the selected modules, with all modules inside them, and parameters that modules read themselves.

    Args:
        net: Network.
        selectors: What to select.
        argument: Name of the argument that they came in, for messages.
        is_layer: Whether a module is a layer, whose parameters go together.

    Raises:
        ValueError: If a pattern or a class matches nothing, a pattern only a part of a layer, or a
            function returns an unknown path.
        TypeError: If a selector is none of the three.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    own_names = _own_names(modules)
    chosen: set[nn.Module | nn.Parameter] = set()
    for selector in _flat(selectors):
        if isinstance(selector, str):
            chosen |= _by_name(selector, modules, own_names, argument, is_layer)
            continue
        if isinstance(selector, type):
            paths: list[str] = [path for path, module in modules.items() if isinstance(module, selector)]
            if not paths:
                raise ValueError(f"{argument} must name modules of the network, it has no {selector.__name__}.")
        elif callable(selector):
            paths: list[str] = list(selector(modules))  # pyright: ignore[reportArgumentType]
        else:
            raise TypeError(f"{argument} must hold names, module classes or functions, got {selector!r}.")
        for path in paths:
            if path not in modules:
                raise ValueError(f"{argument} must return paths of modules, got {path!r}.{did_you_mean(path, modules)}")
            chosen.update(modules[path].modules())
    return chosen


def _flat(selectors: Any) -> Iterator[Any]:
    """Yield one selector after the other of a nest of them."""
    if isinstance(selectors, str) or not isinstance(selectors, Iterable):
        yield selectors
    else:
        for selector in selectors:
            yield from _flat(selector)


def _own_names(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the names of each module's own parameters, by its path."""
    return {
        path: [f"{path}.{key}" if path else key for key, _ in module.named_parameters(recurse=False)]
        for path, module in modules.items()
    }


def _by_name(
    pattern: str,
    modules: Mapping[str, nn.Module],
    own_names: Mapping[str, list[str]],
    argument: str,
    is_layer: Callable[[nn.Module], bool],
) -> set[nn.Module | nn.Parameter]:
    """Return the modules whose path a pattern matches, or all of whose own parameters' names, and single parameters."""
    chosen: set[nn.Module | nn.Parameter] = {
        m for path, module in modules.items() if fnmatchcase(path, pattern) for m in module.modules()
    }
    found = bool(chosen)
    for path, own in own_names.items():
        matched, module = [name for name in own if fnmatchcase(name, pattern)], modules[path]
        found = found or bool(matched)
        if matched and len(matched) == len(own):
            chosen.add(module)
        elif matched and is_layer(module) and module not in chosen:
            raise ValueError(
                f"{argument} must name whole layers, got {pattern!r}, which matches {', '.join(map(repr, matched))} of "
                f"layer {path!r} alone."
            )
        elif matched:
            chosen.update(module.get_parameter(name.rpartition(".")[2]) for name in matched)
    if not found:
        names = [*modules, *(name for own in own_names.values() for name in own)]
        raise ValueError(f"{argument} must name modules of the network, got {pattern!r}.{did_you_mean(pattern, names)}")
    return chosen
