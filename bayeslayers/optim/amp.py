"""Mixed precision: the factor that a `torch.amp.GradScaler` multiplies the loss by, and how it is taken out."""

from __future__ import annotations

from typing import Any

import torch

from bayeslayers.readings import Readings


class LossScale:
    """The factor that a scaler has multiplied the loss by since the last step.

    A scaler hands an optimizer that supports it `grad_scale` and `found_inf` for the time of its step, and knows
    nothing of the statistics, which a power of the factor multiplies.

    Attributes:
        value: The factor as far as it is known; 1 without a scaler.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._unscaled = False

    def unscale(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> float:
        """Take the factor out of the gradients before the step, as `scaler.unscale_` does, and return it."""
        scaler.unscale_(optimizer)
        self.value, self._unscaled = scaler.get_scale(), True
        return self.value

    def handed_over(self, optimizer: Any, statistic: str, readings: Readings) -> tuple[bool, float | None]:
        """Return whether the scaler leaves the step out, and the factor to take out of gradients and statistics.

        Args:
            optimizer: The optimizer in its step.
            statistic: What messages call its statistics.
            readings: What the step reads from the device.

        Returns:
            Whether a gradient has overflown, so that the scaler lowers its factor; and the factor, None where there is
            none to take out.

        Raises:
            RuntimeError: If `scaler.unscale_(optimizer)` took it out of the gradients alone, or the optimizer is one of
                several ranks.
        """
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is None:
            return False, None
        if optimizer.sync:
            raise RuntimeError(
                "sync must be off under a GradScaler, whose ranks would leave out different steps, got it on."
            )
        overflows, *scales = readings.later([torch.as_tensor(x) for x in (found_inf, scale) if x is not None])()
        if overflows:
            return True, None
        if scale is None:
            if not self._unscaled:
                raise RuntimeError(
                    f"gradients must be unscaled by optimizer.unscale_(scaler), got scaler.unscale_(optimizer): the "
                    f"{statistic} would keep the scale."
                )
            return False, None
        self.value = scales[0]
        return False, self.value
