"""Scopes in which modules compute with given tensors in place of their parameters, or with their means again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from bayeslayers.layers.perturbation import Perturbation
from bayeslayers.layers.scope import current, opened
from bayeslayers.sampling.ordinary import is_read, reading_draws
from bayeslayers.sampling.sites import Site


@contextmanager
def placed(
    sites: Sequence[Site],
    values: Mapping[str, Tensor],
    perturbations: Mapping[nn.Module, Perturbation] | None = None,
) -> Iterator[None]:
    """Compute with values in place of the sites' means inside the scope.

    Args:
        sites: The sites that the scope controls; one without a value or a perturbation is at its mean.
        values: Tensors by the sites' names.
        perturbations: How layers sample their outputs.
    """
    outer, modules = current(), {module for site in sites for module, _ in site.places}
    drawn = {module: draws for module, draws in outer.drawn.items() if module not in modules}
    fresh: dict[nn.Module, dict[str, Tensor]] = {}
    for site in sites:
        if site.name in values:
            for module, key in site.places:
                fresh.setdefault(module, {})[key] = values[site.name]
    others = {module: outer.perturbations[module] for module in outer.perturbations if module not in modules}
    scope = replace(outer, drawn=drawn | fresh, perturbations=others | dict(perturbations or {}))
    ordinary = [module for module in fresh if is_read(module)]
    with reading_draws(ordinary), opened(scope):
        yield


@contextmanager
def computing_with(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let one module, of any kind, compute with values in place of its parameters inside the scope.

    Args:
        module: The module.
        values: Tensors by the parameters' names in it.
    """
    outer = current()
    ordinary = (module,) if is_read(module) else ()
    with reading_draws(ordinary), opened(replace(outer, drawn={**outer.drawn, module: values})):
        yield


@contextmanager
def at_means(model: nn.Module) -> Iterator[None]:
    """Compute with the means inside the scope, also within a sampling scope."""
    outer = current()
    if not outer.drawn and not outer.perturbations:
        yield
        return
    modules = set(model.modules())
    drawn, perturbations = (
        {module: value for module, value in part.items() if module not in modules}
        for part in (outer.drawn, outer.perturbations)
    )
    with opened(replace(outer, drawn=drawn, perturbations=perturbations)):
        yield
