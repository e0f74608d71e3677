"""The conversion table: networks of other libraries, tried one at a time in a process beside."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from bayeslayers.batches import with_progress
from recipes.reports.convert_check import ConvertRow
from recipes.reports.convert_names import NETWORKS

COLUMNS = ("converts", "outputs_equal", "vogn_step", "ivon_step", "all_move", "save_load", "epistemic")
_GIGABYTE = 2**30


def benchmark_convert(
    only: str | None = None, file: Path | None = None, seconds: int = 180, gigabytes: float = 6.0
) -> list[ConvertRow]:
    """Convert networks, train them by one step of VOGN and of IVON, save, load and predict.

    Args:
        only: Pattern of names, as in a shell; None for all.
        file: JSON lines of results: networks that are in it are not tried again, others are added to it at once.
        seconds: Limit of time for each network.
        gigabytes: Limit of memory for each.

    Raises:
        ValueError: If no name fits the pattern.
    """
    names = [name for name in NETWORKS if only is None or fnmatchcase(name, only)]
    if not names:
        raise ValueError(
            f"only must fit the name of a network, got {only!r}. Names are such as 'timm:*' or '*resnet*'."
        )
    known = {} if file is None or not file.exists() else _read(file)
    rows = []
    with _Worker(seconds, gigabytes) as worker:
        for name in with_progress("convert", names):
            if (row := known.get(name)) is None:
                row = worker.row_of(name)
                if file is not None:
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(asdict(row)) + "\n")
            rows.append(row)
    return rows


def _read(file: Path) -> dict[str, ConvertRow]:
    """Return the rows of a file by their network; a line that was cut off by an interruption is left out."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = ConvertRow(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rows[row.network] = row
    return rows


class _Worker:
    """A process that tries one network after the other, with a limit of memory; it is started again when it ended."""

    def __init__(self, seconds: int, gigabytes: float):
        self.seconds, self.bytes = seconds, int(gigabytes * _GIGABYTE)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def row_of(self, name: str) -> ConvertRow:
        """Try a network; what breaks a limit fails with the reason."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.seconds)
        line = process.stdout.readline() if ready else ""
        if line:
            return ConvertRow(**json.loads(line))
        self._end()
        reason = f"the process ended with status {process.returncode}" if ready else f"takes more than {self.seconds} s"
        return ConvertRow(name, reason=f"{reason}, with at most {self.bytes / _GIGABYTE:g} GiB")

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None:
            words = [sys.executable, "-W", "ignore", "-m", "recipes.reports.convert_check"]
            path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                preexec_fn=self._limit,
            )
        return self.process

    def _limit(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (self.bytes, self.bytes))

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()


def totals(rows: Sequence[ConvertRow]) -> str:
    """Return one line that counts what holds for how many networks."""
    counts = [f"{column} {sum(bool(getattr(row, column)) for row in rows)}" for column in COLUMNS]
    covered = sum((row.coverage or 0.0) >= 0.99 for row in rows)
    return f"{len(rows)} networks: {', '.join(counts)}, coverage >= 99 % {covered}."


def shown(row: ConvertRow) -> tuple[object, ...]:
    """Return the cells of a row for a table: yes, no or nothing in place of true, false and unknown."""
    words = {True: "yes", False: "no", None: ""}
    coverage = "" if row.coverage is None else f"{100 * row.coverage:.1f} %"
    marks = {column: words[getattr(row, column)] for column in COLUMNS}
    return (
        row.network,
        f"{row.parameters:,}",
        marks.pop("converts"),
        marks.pop("outputs_equal"),
        coverage,
        *marks.values(),
        row.reason,
    )


HEAD = (
    "network",
    "parameters",
    "converts",
    "outputs equal",
    "coverage",
    "VOGN",
    "IVON",
    "all move",
    "saved",
    "epistemic",
    "reason",
)
