"""Metrics of corrupted images by kind and severity of the corruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslayers.display import as_text, printable

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class CorruptionMetrics:
    """Accuracy, NLL and ECE of corrupted images; prints as a table by severity.

    Attributes:
        kinds: Names of the k corruptions.
        clean: Metrics without corruption: "accuracy", "nll", "ece".
        values: The same metrics by kind and severity, float64 `(k, severities)`; severities count from 1.
    """

    kinds: tuple[str, ...]
    clean: dict[str, float]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, clean: Mapping[str, float], found: Mapping[str, Sequence[Mapping[str, float]]]) -> CorruptionMetrics:
        """Return the metrics of each kind, whose severities come in order, beside those without corruption."""
        values = {
            name: torch.tensor([[fit[name] for fit in fits] for fits in found.values()], dtype=torch.float64)
            for name in METRICS
        }
        return cls(tuple(found), {name: clean[name] for name in METRICS}, values)

    def by_severity(self) -> dict[str, Tensor]:
        """Return each metric's mean over the kinds, `(severities,)`."""
        return {name: value.mean(0) for name, value in self.values.items()}

    def summary(self) -> dict[str, float]:
        """Return each metric's mean over kinds and severities, as `corrupted_METRIC`."""
        return {f"corrupted_{name}": float(value.mean()) for name, value in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON: lists by severity for each metric, their mean and those of each kind."""
        means = {name: value.tolist() for name, value in self.by_severity().items()}
        each = {
            kind: {name: value[row].tolist() for name, value in self.values.items()}
            for row, kind in enumerate(self.kinds)
        }
        return {"clean": self.clean, "mean": means, "kinds": each}

    def __rich__(self) -> Table:
        from rich.table import Table

        count = len(self.kinds)
        table = Table("severity", caption=f"Means over {count} kind{'s' * (count > 1)} of corruption.")
        for name in METRICS:
            table.add_column(name, justify="right")
        table.add_column("lowest accuracy")
        table.add_row("clean", *(f"{self.clean[name]:.4f}" for name in METRICS), "")
        means, worst = self.by_severity(), self.values["accuracy"].min(0)
        for column, (value, row) in enumerate(zip(worst.values.tolist(), worst.indices.tolist(), strict=True)):
            numbers = (f"{float(means[name][column]):.4f}" for name in METRICS)
            table.add_row(str(column + 1), *numbers, f"{value:.4f} {printable(self.kinds[row])}")
        return table

    def __str__(self) -> str:
        return as_text(self)
