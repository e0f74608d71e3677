"""What a conversion did to every parameter tensor of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bayeslayers.display import as_text

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["converted", "deterministic", "tied"]


@dataclass(frozen=True)
class TensorEntry:
    """One parameter tensor of a converted network.

    Attributes:
        name: Its name in `named_parameters()`.
        shape: Its shape.
        numel: Number of its entries.
        status: "converted", "deterministic", or "tied": deterministic because several modules own it.
        reason: Why it is not converted, or what else there is to know.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    status: Status
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What `to_bayesian` did, tensor by tensor; it prints as a table.

    Attributes:
        entries: One for each parameter tensor, in the order of `named_parameters()`.
    """

    entries: tuple[TensorEntry, ...]

    @property
    def totals(self) -> dict[Status, int]:
        """Number of parameters of each status."""
        totals: dict[Status, int] = {"converted": 0, "deterministic": 0, "tied": 0}
        for entry in self.entries:
            totals[entry.status] += entry.numel
        return totals

    @property
    def coverage(self) -> float:
        """Share of the parameters that are Bayesian, in [0, 1]."""
        totals = self.totals
        return totals["converted"] / max(1, sum(totals.values()))

    def __rich__(self) -> Table:
        from rich.table import Table

        counts = ", ".join(f"{count:,} {status}" for status, count in self.totals.items() if count)
        caption = f"{self.coverage:.1%} of the parameters are Bayesian: {counts}."
        if self.totals["converted"] < sum(self.totals.values()):
            caption += " The others are trained too, by Adam in a parameter group of their own."
        table = Table("parameter", "shape", "status", "reason", caption=caption)
        for entry in self.entries:
            table.add_row(entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.status, entry.reason)
        return table

    def __str__(self) -> str:
        return as_text(self)
