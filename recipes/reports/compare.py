"""Training runs side by side: a table of their metrics, and a picture of their curves and their reliability."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.names import shortest_ends
from recipes.reports.tables import cell
from recipes.training.run_folder import OOD, Column, Run, measured_on, read_run

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


@dataclass(frozen=True)
class _Shown:
    """A column of numbers: what it shows of a row, how, and which value is best, if one is."""

    key: str
    title: str
    show: Callable[[float], str]
    best: Callable[[Iterable[float]], float] | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; it prints as a table, the best of each column in bold where all are of one data set.

    Attributes:
        runs: By the shortest end of its folder's path that no other one has, in the order they were asked for.
    """

    runs: dict[str, Run]

    @property
    def reference(self) -> str:
        """The run whose time the others' costs are ratios to: the first one of Adam, else the first one."""
        of_adam = (name for name, run in self.runs.items() if run.plan and run.plan.method == "adam")
        return next(of_adam, next(iter(self.runs)))

    def rows(self) -> list[dict[str, Any]]:
        """Return each run's metrics by name, None for one that it lacks."""
        unit = self.runs[self.reference].seconds_per_epoch
        first = [f"train_{name}" for name in self._trained()]
        keys = dict.fromkeys((*self._metrics(), *(key for run in self.runs.values() for key in run.metrics)))
        rows = []
        for name, run in self.runs.items():
            numbers = {key: run.curves.get(key, [math.nan])[-1] for key in first}
            numbers |= {key: run.metrics.get(key, math.nan) for key in keys}
            seconds = run.seconds_per_epoch
            numbers |= {"seconds_per_epoch": seconds, "cost": seconds / unit if unit else math.nan}
            plan = {"method": run.plan and run.plan.method, "data": run.plan and run.plan.data}
            plan |= {"epochs": run.epochs, "planned_epochs": run.plan and run.plan.epochs, "finished": run.finished}
            finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
            rows.append({"run": name, "folder": str(run.folder)} | plan | finite)
        return rows

    def to_json(self) -> str:
        """Return the rows as JSON."""
        return json.dumps(self.rows(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the table as Markdown, what is best in bold."""
        from bayeslayers.display import printable

        lines = [
            [f"`{name}`", *words, *(f"**{text}**" if best else text for text, best in numbers)]
            for (name, *words), numbers in self._lines()
        ]
        texts = len(lines[0]) - len(self._columns())
        table = [self.titles(), ["---"] * texts + ["---:"] * len(self._columns()), *lines]
        escaped = ([printable(text).replace("|", "\\|") for text in row] for row in table)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped) + f"\n{printable(self._caption())}\n"

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=cell(self._caption()), caption_justify="left")
        titles = self.titles()
        texts = len(titles) - len(self._columns())
        for number, title in enumerate(titles):
            heading = Text("\n").join(map(cell, title.split()))
            table.add_column(heading, justify="left" if number < texts else "right")
        for row in self.cells():
            table.add_row(*row)
        return table

    def cells(self) -> list[list[Text]]:
        """Return the cells of the table's rows, what is best in bold."""
        return [
            [*map(cell, words), *(cell(text, "bold" if best else "") for text, best in numbers)]
            for words, numbers in self._lines()
        ]

    def _metrics(self) -> dict[str, Column]:
        """Return how the metrics of all runs read, by name."""
        return {column.name: column for run in self.runs.values() for column in run.columns}

    def _trained(self) -> dict[str, Column]:
        """Return those whose value on the training data is shown too: the first of each task."""
        return {run.columns[0].name: run.columns[0] for run in self.runs.values()}

    def _columns(self) -> list[_Shown]:
        ood = dict.fromkeys(key for run in self.runs.values() for key in run.metrics if key.startswith(OOD))
        return [
            # To fit the training data the most is no merit.
            *(_Shown(f"train_{name}", f"training {c.title}", _form(c), None) for name, c in self._trained().items()),
            *(_Shown(name, c.title, _form(c), _BEST[c.better]) for name, c in self._metrics().items()),
            *(_Shown(key, f"AUROC {key.removeprefix(OOD)}", "{:.3f}".format, max) for key in ood),
            _Shown("seconds_per_epoch", "s/epoch", "{:.1f}".format, min),
            _Shown("cost", "cost", "{:.2f}".format, min),
        ]

    def _data(self) -> list[str]:
        """Return the data sets of the runs, of those with a configuration."""
        return sorted({run.plan.data for run in self.runs.values() if run.plan})

    def titles(self) -> list[str]:
        """Return the titles of the table's columns."""
        return ["run", "method", *["data"] * (len(self._data()) > 1), "epochs", *(c.title for c in self._columns())]

    def _lines(self) -> list[tuple[list[str], list[tuple[str, bool]]]]:
        """Return for each run its words, and its numbers with whether each is the best of its column."""
        rows, several = self.rows(), len(self._data()) > 1
        shown = [_shown([row[column.key] for row in rows], column, ranked=not several) for column in self._columns()]
        lines = []
        for row, *numbers in zip(rows, *shown, strict=True):
            data = [row["data"] or "-"] if several else []
            lines.append(([row["run"], row["method"] or "-", *data, _progress(row)], numbers))
        return lines

    def _caption(self) -> str:
        text = f"Cost: median time of an epoch, beside that of {self.reference}."
        unfinished = [run for run in self.runs.values() if not run.finished]
        return text + f" Unfinished: {measured_on(unfinished)} metrics after the last epoch." * bool(unfinished)


_BEST: Mapping[str, Callable[[Iterable[float]], float]] = {"higher": max, "lower": min}


def _form(column: Column) -> Callable[[float], str]:
    """Return how a metric is written."""
    if column.percent:
        return lambda value: f"{100 * value:.2f} %"
    return lambda value: f"{value:.{column.digits}f}"


def _progress(row: Mapping[str, Any]) -> str:
    """Return how many epochs are done, and whether there is more to come."""
    if row["finished"]:
        return str(row["epochs"])
    planned = f" of {row['planned_epochs']}" if row["planned_epochs"] else ""
    return f"{row['epochs']}{planned}, unfinished"


def _shown(values: Sequence[float | None], column: _Shown, ranked: bool) -> list[tuple[str, bool]]:
    """Return the texts of a column, and which of them read as the best, where not all do."""
    texts = ["-" if value is None else column.show(value) for value in values]
    if not (ranked and column.best and len(set(texts) - {"-"}) > 1):
        return [(text, False) for text in texts]
    best = column.show(column.best(value for value in values if value is not None))
    return [(text, text == best) for text in texts]


def compare(folders: Sequence[str | Path], output: str | Path | None = None) -> Comparison:
    """Return runs side by side, and draw them if there is a path.

    Args:
        folders: Run folders; one that is named twice counts once.
        output: Picture to write, or None.

    Raises:
        OSError: If a folder is not there, or holds no log.
        ValueError: If there is no folder, or a file in one is damaged.
    """
    places: dict[Path, str | Path] = {}
    for folder in folders:
        places.setdefault(Path(os.path.abspath(folder)), folder)
    if not places:
        raise ValueError("runs must be one folder or more, got none.")
    runs = {
        name: read_run(folder)
        for name, folder in zip(shortest_ends([path.parts[1:] for path in places]), places.values(), strict=True)
    }
    if output is not None:
        from recipes.reports.compare_figure import draw

        draw(runs, output)
    return Comparison(runs)
