"""A training run as its folder tells of it: the log, the final metrics, the reliability."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from recipes.data.names import short_name

LOG, METRICS, REPORT, CONFIG, POSTERIOR = "log.csv", "metrics.json", "report.json", "config.json", "posterior"
CURVES, BEST, CHECKPOINT = "curves.png", "best", "checkpoint.safetensors"
_OUTPUTS = (CHECKPOINT, LOG, METRICS, REPORT, POSTERIOR, BEST)
WRITTEN = (LOG, METRICS, REPORT, "report.html", CONFIG, POSTERIOR, CURVES, BEST, CHECKPOINT)
OOD = "ood_auroc_"

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """How a metric of a task reads where runs are compared.

    Attributes:
        name: The metric, as log and metrics.json name it.
        title: Heading of its column.
        better: "higher" or "lower".
        unit: Behind the title in a picture: "nats".
        percent: Whether it is shown as a percentage.
        digits: Digits behind the point, of one that is not.
    """

    name: str
    title: str
    better: Literal["higher", "lower"] = "lower"
    unit: str = ""
    percent: bool = False
    digits: int = 4


# Of a run whose configuration names no columns, as none did before tasks had their own.
DEFAULT_COLUMNS = (
    Column("accuracy", "accuracy", "higher", percent=True),
    Column("nll", "NLL", unit="nats"),
    Column("ece", "ECE"),
    Column("misclassification_auroc_confidence", "AUROC errors", "higher", digits=3),
)


@dataclass(frozen=True)
class Plan:
    """What a run's configuration says of it.

    Attributes:
        method: The optimizer, and after it a Laplace approximation or another way to predict.
        data: Data set.
        epochs: Epochs to train.
        columns: How its metrics read.
    """

    method: str
    data: str
    epochs: int
    columns: tuple[Column, ...] = DEFAULT_COLUMNS


@dataclass(frozen=True)
class Run:
    """A training run. A metric that its folder lacks is NaN, or not there.

    Attributes:
        folder: Where it is.
        plan: None without a configuration.
        held_out: Examples that it was measured on after each epoch: "test" or "val".
        curves: By name "epoch", "seconds", and of each column the metric of the held-out examples and, as "train_NAME",
            of the training ones: a value for each epoch.
        metrics: Those of the test examples at its end; those after the last epoch if it is not finished.
        finished: Whether it was measured at its end.
        reliability: Confidence, accuracy and share of the examples, of each bin that holds any; None without a report,
            empty where a report has none.
    """

    folder: Path
    plan: Plan | None
    held_out: str
    curves: dict[str, list[float]]
    metrics: dict[str, float]
    finished: bool
    reliability: list[tuple[float, float, float]] | None

    @property
    def columns(self) -> tuple[Column, ...]:
        """How its metrics read."""
        return self.plan.columns if self.plan else DEFAULT_COLUMNS

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return int(self.curves["epoch"][-1])

    @property
    def seconds_per_epoch(self) -> float:
        """Median time of an epoch's training steps."""
        return statistics.median([x for x in self.curves["seconds"] if not math.isnan(x)] or [math.nan])


def check_folder(name: str, folder: Path) -> None:
    """Refuse a file where a folder is to be written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{name} must be a folder, got {folder}, which is a file.")


def has_checkpoint(folder: Path, resume: bool) -> bool:
    """Return whether there is a checkpoint to resume, and refuse to write over another run.

    A run that ended before its first checkpoint has left nothing that would be lost by starting again.

    Args:
        folder: Run folder.
        resume: Whether the run in it, if any, is to be resumed.

    Raises:
        FileExistsError: If a run is there, which is not to be resumed.
        PosteriorError: If more than the beginning of a run is there, and its checkpoint is gone.
    """
    there = [name for name in _OUTPUTS if (folder / name).exists()]
    lost = CHECKPOINT not in there and not set(there) <= {BEST}
    if there and not resume:
        advice = "Choose another" if lost else "Add --resume or choose another"
        raise FileExistsError(f"output must be a new run, got {folder} with {there[0]}. {advice}.")
    if lost:
        from bayeslayers.storage.card import PosteriorError  # `compare`, which reads runs, needs no torch

        raise PosteriorError(f"{folder / CHECKPOINT} must be a training checkpoint, got no such file.")
    return CHECKPOINT in there


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Say what a run has kept, and what to do, when one of its files cannot be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        saved = (folder / CHECKPOINT).exists()
        advice = (
            "The last checkpoint is kept: repair this, and add --resume"
            if saved
            else "Nothing was saved yet: start again"
        )
        if error.errno is None:
            raise OSError(f"{str(error).rstrip('.')}. {advice}.") from error
        name = f", {error.filename}" if error.filename else ""
        raise OSError(error.errno, f"{error.strerror}{name}. {advice}.") from error


def clear_leftovers(folder: Path, names: Sequence[str]) -> None:
    """Remove what was being written when a run was killed: `.NAME-*`, beside files that are whole."""
    for path in folder.iterdir():
        if path.name.startswith(tuple(f".{name}-" for name in names)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def log_text(rows: Sequence[Mapping[str, float]]) -> str:
    """Return the text of a log: the columns of its first row, a line for each epoch."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def measured_on(runs: Iterable[Run]) -> str:
    """Return which examples runs were measured on after each epoch, in words."""
    return " or ".join(sorted({"validation" if run.held_out == "val" else run.held_out for run in runs}))


def read_run(folder: str | Path) -> Run:
    """Return the run of a folder that training wrote, finished or not.

    Args:
        folder: Its folder.

    Raises:
        OSError: If there is no such folder, or no log in it.
        ValueError: If a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise NotADirectoryError(f"run must be a folder, got {folder}, which is {what}.")
    if not (folder / LOG).is_file():
        raise FileNotFoundError(f"run must hold {LOG}, got {folder} without. Training writes it after the first epoch.")
    plan = _parsed(folder / CONFIG, plan_of)
    columns = plan.columns if plan else DEFAULT_COLUMNS
    log = _parsed(folder / LOG, partial(_log, columns=columns))
    assert log is not None
    held_out, curves = log
    if held_out is None:
        raise ValueError(
            f"run must have metrics of test or validation examples, got {folder}, whose {LOG} has other columns."
        )
    metrics = _parsed(folder / METRICS, partial(_metrics, columns=columns))
    return Run(
        folder=folder,
        plan=plan,
        held_out=held_out,
        curves=curves,
        metrics={column.name: curves[column.name][-1] for column in columns} if metrics is None else metrics,
        finished=metrics is not None,
        reliability=_parsed(folder / REPORT, _reliability),
    )


def _parsed(path: Path, parse: Callable[[str], T]) -> T | None:
    """Return what a file says, None if there is none."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, csv.Error):
        raise ValueError(
            f"{path.name} must be as training writes it, got {path}, which is damaged. Train the run again."
        ) from None


def _log(text: str, columns: Sequence[Column]) -> tuple[str | None, dict[str, list[float]]]:
    """Return which examples a log measures, None for none of these columns, and the run's curves."""
    rows = list(csv.DictReader(text.splitlines(), strict=True))
    if not rows or any(None in row or None in row.values() for row in rows):  # none, or one too long or too short
        raise ValueError
    names = [column.name for column in columns]
    splits = (split for split in ("val", "test") if any(f"{split}_{name}" in rows[0] for name in names))
    held_out = next(splits, None)
    keys = {key: key for key in ("seconds", *(f"train_{name}" for name in names))}
    keys |= {name: f"{held_out}_{name}" for name in names}
    curves = {name: [float(row.get(key) or math.nan) for row in rows] for name, key in keys.items()}
    return held_out, {"epoch": [float(int(row["epoch"])) for row in rows]} | curves


def _metrics(text: str, columns: Sequence[Column]) -> dict[str, float]:
    metrics, names = json.loads(text), {column.name for column in columns}
    chosen = (key for key in metrics if key in names or (key.startswith(OOD) and not _of_epistemic(key, metrics)))
    return {key: math.nan if metrics[key] is None else float(metrics[key]) for key in chosen}


def _of_epistemic(key: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether an AUROC is of the epistemic uncertainty, beside one of the total."""
    return key.endswith("_epistemic") and key.removesuffix("_epistemic") in metrics


def plan_of(text: str) -> Plan:
    """Return the plan that a configuration, as JSON, makes."""
    config = json.loads(text)
    laplace, how = config.get("laplace"), config.get("evaluation", {}).get("method")
    words = [config["optimizer"]["name"], *["laplace"] * (laplace is not None), *[how] * (how is not None)]
    columns = tuple(_column(values) for values in config.get("columns", [])) or DEFAULT_COLUMNS
    return Plan(", ".join(words), short_name(str(config["data"])), int(config["epochs"]), columns)


def _column(values: Mapping[str, Any]) -> Column:
    column = Column(**values)
    texts = column.name, column.title, column.unit
    if (
        column.better not in ("higher", "lower")
        or column.digits not in range(10)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise ValueError
    return column


def config_text(config: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Return the text of a run's configuration, with how its metrics read."""
    return json.dumps({**config, "columns": [asdict(column) for column in columns]}, indent=2)


def _reliability(text: str) -> list[tuple[float, float, float]]:
    reliability = json.loads(text).get("reliability")
    if reliability is None:
        return []
    bins = list(zip(*(reliability[key] for key in ("confidence", "accuracy", "count")), strict=True))
    total = sum(count for *_, count in bins)
    return [(float(confidence), float(accuracy), count / total) for confidence, accuracy, count in bins if count]
