"""Steps that would leave the range of floating-point numbers: they are refused, or undone.

Where the `bounds` do not show a step to be harmless, its numbers are checked, and it is made from a snapshot, looked
at, and undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.layers import BayesianLayer
from bayeslayers.optim.bundle import Bundle
from bayeslayers.sampling import Site
from bayeslayers.sampling.flat import spread


def all_finite(tensors: Sequence[Tensor], factor: float) -> bool:
    """Return whether all entries of tensors are finite, also when multiplied by a factor."""
    # A sum is finite only if every entry is: one reduction each, one look at the result.
    sums = [tensor.sum() for tensor in tensors]
    return not sums or bool((torch.stack(sums) * factor).isfinite().all())


def refuse_not_finite(quantities: Mapping[str, Mapping[Any, Tensor]], names: Mapping[Any, str], ess: float) -> None:
    """Raise if a tensor that a step is made of is not finite, or would not be where it enters the precision.

    Args:
        quantities: For each quantity, as "gradient", its tensors by parameter or name.
        names: Names of the parameters.
        ess: What they are multiplied by in the step.

    Raises:
        FloatingPointError: If so.
    """
    for quantity, tensors in quantities.items():
        for key, tensor in tensors.items():
            if bad := int((~(tensor * ess).isfinite()).sum()):
                raise FloatingPointError(
                    f"the {quantity} of '{names.get(key, key)}' must be finite, got {bad} of {tensor.numel()} entries "
                    "that are not. The step is rejected, and the posterior is unchanged. Lower lr, or look at the "
                    "batch."
                )


def refuse_new_precisions(bundles: Iterable[Bundle], names: Mapping[nn.Parameter, str]) -> None:
    """Raise if a precision that a step has planned, in the place of a bundle's statistic, is not finite.

    Raises:
        FloatingPointError: If so.
    """
    outside: Counter[nn.Parameter] = Counter()
    for bundle in bundles:
        parts = spread(bundle.statistic, bundle.parameters)
        outside.update({p: int((~part.isfinite()).sum()) for p, part in zip(bundle.parameters, parts, strict=True)})
    for parameter, bad in outside.items():
        if bad:
            raise FloatingPointError(
                f"the precision of '{names[parameter]}' must be finite, got {bad} of {parameter.numel()} entries that "
                "would not be. The step is rejected, and the posterior is unchanged. Lower lr, or look at the batch."
            )


class Snapshot:
    """What a step changes, as it was before.

    Args:
        sites: Uncertain tensors.
        names: All parameters, and their names.
        state: The optimiser's state.
    """

    def __init__(
        self,
        sites: Mapping[nn.Parameter, Site],
        names: Mapping[nn.Parameter, str],
        state: MutableMapping[Any, dict[str, Any]],
    ):
        self._sites, self._names, self._state = sites, names, state
        moving = [p for p in names if p.grad is not None]
        self._values = {p: p.detach().clone() for p in moving}
        self._precisions = {p: sites[p].precision.clone() for p in moving if p in sites}
        self._states = {p: {k: _copied(v, p) for k, v in state[p].items()} for p in moving if p in state}
        self._layers = {
            m: m.correlations for p in moving if p in sites and isinstance(m := sites[p].module, BayesianLayer)
        }

    def refuse_values_outside_range(self) -> None:
        """Raise if a mean, a precision or a deterministic value has left the range.

        Raises:
            FloatingPointError: If so.
        """
        for parameter in self._values:
            uncertain = parameter in self._sites
            self._refuse("mean" if uncertain else "value", parameter, ~parameter.isfinite())
            if uncertain:
                precision = self._sites[parameter].precision
                self._refuse("precision", parameter, ~(precision.isfinite() & (precision > 0)))

    def _refuse(self, quantity: str, parameter: nn.Parameter, outside: Tensor) -> None:
        if entries := int(outside.sum()):
            raise FloatingPointError(
                f"the {quantity} of '{self._names[parameter]}' would not be finite in {entries} entries. The step is "
                "rejected, and the posterior is unchanged. Lower lr."
            )

    def restore(self) -> None:
        """Put everything back."""
        for parameter, value in self._values.items():
            parameter.copy_(value)
            if parameter in self._precisions:
                self._sites[parameter].precision.copy_(self._precisions[parameter])
            self._state.pop(parameter, None)
            if parameter in self._states:
                self._state[parameter] = self._states[parameter]
        for layer, correlations in self._layers.items():
            layer.set_correlations(correlations)


def _copied(value: Any, parameter: Tensor) -> Any:
    """Return a copy of a state's tensor that steps change in place, which has the parameter's shape."""
    return value.clone() if isinstance(value, Tensor) and value.shape == parameter.shape else value
