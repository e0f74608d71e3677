"""Which parameter tensors of a network are Bayesian, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from bayeslayers.display import as_text
from bayeslayers.sampling import posterior
from bayeslayers.unwrap import unwrapped

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

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
        frozen: Whether it required no gradient.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    status: Status
    reason: str
    frozen: bool = False


@dataclass(frozen=True)
class Refusal:
    """A layer or parameter that a step of VOGN would refuse.

    Attributes:
        name: Its name, which `to_bayesian(exclude=)` takes.
        reason: Why, and what to do.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What became of a network's parameters, tensor by tensor; it prints as a table.

    Attributes:
        entries: One for each parameter tensor, in the order of `named_parameters()`.
        refusals: What a step of VOGN would refuse, as a trial with the example inputs found; None without a trial.
    """

    entries: tuple[TensorEntry, ...]
    refusals: tuple[Refusal, ...] | None = None

    @property
    def exclude(self) -> list[str]:
        """The names of all refusals, for `to_bayesian(exclude=)`; [] without a trial."""
        return [refusal.name for refusal in self.refusals or ()]

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

    def __rich__(self) -> Group | Table:
        from rich.console import Group

        if self.refusals is None:
            return self._table()
        return Group(self._table(), "", _sentences(self.refusals))

    def _table(self) -> Table:
        from rich.table import Table

        counts = ", ".join(f"{count:,} {status}" for status, count in self.totals.items() if count)
        caption = f"{self.coverage:.1%} of the parameters are Bayesian: {counts}."
        if self.totals["converted"] < sum(self.totals.values()):
            caption += " The others are trained too, by Adam in a parameter group of their own, unless they are frozen."
        table = Table("parameter", "shape", "status", "reason", caption=caption)
        for entry in self.entries:
            table.add_row(entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.status, entry.reason)
        return table

    def __str__(self) -> str:
        return as_text(self)


def _sentences(refusals: Sequence[Refusal]) -> Text:
    """Return what a trial found, as text."""
    from rich.text import Text

    if not refusals:
        return Text("A trial step found the exact curvature of every Bayesian layer.")
    lines = [f"A step of VOGN would refuse {len(refusals)} of these layers and parameters:"]
    lines += [f"- '{refusal.name}': {refusal.reason}" for refusal in refusals]
    names = [refusal.name for refusal in refusals]
    lines.append(f"to_bayesian(model, exclude={names}) leaves them out; IVON takes the model as it is.")
    return Text("\n".join(lines))


def entry_of(name: str, parameter: nn.Parameter, status: Status, notes: Sequence[str]) -> TensorEntry:
    """Return the entry of one parameter, which also says if that is frozen.

    Args:
        name: Its name.
        parameter: The parameter.
        status: What became of it.
        notes: What there is to know, reasons first.
    """
    frozen = not parameter.requires_grad
    reason = "; ".join([*notes, "frozen"] if frozen else notes)
    return TensorEntry(name, tuple(parameter.shape), parameter.numel(), status, reason, frozen)


def report_of(model: nn.Module) -> ConversionReport:
    """Return the report of a model as it is: which parameters have a posterior beside them.

    Args:
        model: Any model, also in torch's wrappers; the names are those of the network inside.
    """
    network = unwrapped(model)
    uncertain = {site.mean for site in posterior(network)}
    entries = []
    for name, parameter in network.named_parameters():
        notes = [] if parameter in uncertain else ["has no posterior in the model as it was given"]
        entries.append(entry_of(name, parameter, "converted" if parameter in uncertain else "deterministic", notes))
    return ConversionReport(tuple(entries))
