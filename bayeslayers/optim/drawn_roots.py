"""The roots of layers' posteriors in the form that training multiplies noise by: reduced, where their inverses are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslayers.distributions.low_rank import Reduced, between
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers.correlated import Product
from bayeslayers.optim.factors import FACTORS
from bayeslayers.sampling import Site

Roots = tuple[Reduced, Reduced]


class DrawnRoots:
    """Reduced roots, of which the layers hold all entries. Those of a layer whose own have changed since are not used.

    The state of the optimiser keeps them, so that training that is resumed draws the same.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def of(self, sites: Iterable[Site], states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, Product]:
        """Return by layer what multiplies noise by its roots, where they are reduced.

        Args:
            sites: The uncertain tensors.
            states: The state of the optimiser, by tensor.
        """
        found = {}
        for site in sites:
            layer: Any = site.module
            if f"{FACTORS[0]}_root" not in (state := states.get(site.mean, {})):
                continue
            if layer.root_scale is not None:
                continue
            tensors = [*(state[f"{name}_root"] for name in FACTORS), *(layer.roots or ())]
            if (known := self._known.get(layer)) is None or not known.is_of(tensors):
                known = _Known(tensors, [tensor._version for tensor in tensors], _reduced(layer.roots, state))
                self._known[layer] = known
            if known.roots is not None:
                found[layer] = functools.partial(_between, *known.roots)
        return found


def _between(input_root: Reduced, output_root: Reduced, noise: Tensor) -> Tensor:
    return between(output_root, noise, input_root)


class _Known(NamedTuple):
    """What was found for tensors as they were then."""

    tensors: Sequence[Tensor]
    versions: Sequence[int]
    roots: Roots | None

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        same = len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))
        return same and [tensor._version for tensor in tensors] == self.versions


def kept(roots: Roots) -> dict[str, Any]:
    """Return what a layer's state keeps of its roots: of a whole one, which the layer has, nothing but its size."""
    pairs = list(zip(FACTORS, roots, strict=True))
    matrices = {f"{name}_root": root.matrix if root.rest else root.matrix[:, :0] for name, root in pairs}
    return {**matrices, **{f"{name}_root_rest": root.rest for name, root in pairs}}


def _reduced(own: tuple[Tensor, Tensor] | None, state: Mapping[str, Any]) -> Roots | None:
    """Return the roots in a state, None where the layer's own are others, or none of the two is reduced."""
    if own is None or not any(state[f"{name}_root_rest"] for name in FACTORS):
        return None
    found = []
    for root, name in zip(own, FACTORS, strict=True):
        matrix, rest = state[f"{name}_root"], state[f"{name}_root_rest"]
        if not rest:
            found.append(Reduced(root))
            continue
        reduced = Reduced(at_least_float32(matrix), rest)
        if (root.dtype, root.device, len(root)) != (reduced.matrix.dtype, matrix.device, len(matrix)):
            return None
        if not torch.equal(reduced.whole(), root):
            return None
        found.append(reduced)
    return found[0], found[1]
