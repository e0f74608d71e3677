"""Tables of numbers: features and targets of a regression, from NumPy archives and CSV files, within limits."""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayeslayers.checks import did_you_mean
from recipes.data.examples import Points
from recipes.data.gap import GAP, INSIDE, Gap, curve, inside
from recipes.data.names import expanded

UCI = ("boston-housing", "concrete", "energy", "kin8nm", "naval", "power-plant", "protein", "wine-red", "yacht")
LARGEST_FILE, MOST_VALUES, LONGEST_LINE = 2**30, 2**27, 2**20  # bytes, numbers of a table, characters of a row
_INSIDE = 100  # points in the gap of the toy
_DRAWN_TEST, _DRAWN_SPLITS = 0.1, 20  # share and number of the splits of a table that has none of its own


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        x: Features `(n, d)`, float64.
        y: Targets `(n, k)`, float64; of no columns where a file has features alone.
        features: Names of the features; empty where the file has none.
        targets: Names of the targets; empty likewise.
        tests: Rows of the test split of each split `(splits, m)`; None where the table has none of its own.
    """

    x: Tensor
    y: Tensor
    features: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    tests: Tensor | None = None

    @property
    def num_splits(self) -> int:
        """How many splits there are."""
        return _DRAWN_SPLITS if self.tests is None else len(self.tests)

    def split(self, number: int) -> tuple[Points, Points]:
        """Return the training and the test rows of a split, as float32.

        A table without splits of its own has 20, each of a tenth of the rows, drawn by its number.

        Raises:
            ValueError: If there is no such split.
        """
        if not 0 <= number < self.num_splits:
            raise ValueError(f"split must be from 0 to {self.num_splits - 1}, got {number}.")
        if self.tests is None:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(number))
            rows = order[: max(1, round(_DRAWN_TEST * len(order)))]
        else:
            rows = self.tests[number]
        test = torch.zeros(len(self.x), dtype=torch.bool).index_fill_(0, rows, True)
        return self.points(~test), self.points(test)

    def with_features(self, names: Sequence[str], file: str) -> Table:
        """Return the same rows with the columns of these names as features, and the others as targets.

        A table without names of its columns stays as it is, and so does every table without `names`.

        Args:
            names: Names of the features, in their order.
            file: What an error says the table is.

        Raises:
            ValueError: If there is no column of such a name.
        """
        columns = [*self.features, *self.targets]
        if not (names and columns):
            return self
        if missing := [name for name in names if name not in columns]:
            near = did_you_mean(missing[0], columns)
            raise ValueError(f"{file} must have the posterior's columns, got none of the name {missing[0]!r}.{near}")
        values, first = torch.cat([self.x, self.y], 1), [columns.index(name) for name in names]
        rest = [column for column in range(len(columns)) if column not in first]
        targets = tuple(columns[column] for column in rest)
        return Table(values[:, first], values[:, rest], tuple(names), targets, self.tests)

    def points(self, rows: Tensor | slice = slice(None)) -> Points:
        """Return some rows as float32."""
        return Points(self.x[rows].float(), self.y[rows].float())


def load_table(name: str, root: str | Path | None = None, target: Sequence[str] = (), argument: str = "data") -> Table:
    """Return a table.

    Args:
        name: "gap", the toy, or "inside-gap", points where it has no examples; a name of `UCI`, the file
            `uci/NAME.npz` of `root`; "npz:PATH", see `read_npz`; or "csv:PATH", see `read_csv`.
        root: Folder of data; None for the folder `data`.
        target: Names of the target columns of a CSV file; none for the last column.
        argument: What errors say was to name it.

    Raises:
        ValueError: If the name is unknown, or the file is not such a table; the message names file and row.
        FileNotFoundError: If there is no such file.
    """
    kind, _, path = name.partition(":")
    if name == GAP:
        x, y = Gap().rows()
        return Table(x.double(), y.double(), tests=Gap().tests())
    if name == INSIDE:
        x = inside(_INSIDE).double()
        return Table(x, curve(x))
    if name in UCI:
        return read_npz(Path(root or "data") / "uci" / f"{name}.npz", argument)
    if kind == "npz" and path:
        return read_npz(Path(expanded(path)), argument)
    if kind == "csv" and path:
        return read_csv(Path(expanded(path)), target, argument)
    known = (GAP, INSIDE, *UCI)
    raise ValueError(
        f"unknown table {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}, npz:PATH, csv:PATH."
    )


def read_npz(path: Path, argument: str = "data") -> Table:
    """Return the table of a NumPy archive: `x (n, d)`, `y (n,)` or `(n, k)`, and `test_index (splits, m)` if it has it.

    Raises:
        ValueError: If it is no such archive.
        FileNotFoundError: If it is not there.
    """
    _check_file(path, argument)
    arrays = _arrays(path)
    if missing := {"x", "y"} - arrays.keys():
        raise ValueError(f"{path} must hold the arrays x and y, got none of the name {' or '.join(sorted(missing))}.")
    for key, array in arrays.items():
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{key} of {path} must hold numbers, got values of type {array.dtype}.")
    x, y = (torch.from_numpy(np.array(arrays[key], dtype=np.float64)) for key in ("x", "y"))
    y = y[:, None] if y.dim() == 1 else y
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not x.numel() or not y.numel():
        raise ValueError(f"{path} must hold x (n, d) and y (n,) or (n, k), got {tuple(x.shape)} and {tuple(y.shape)}.")
    for key, values in (("x", x), ("y", y)):
        if len(bad := (~values.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            raise ValueError(
                f"{key} of {path} must be finite, got {values[row, column]} in row {row}, column {column}, and "
                f"{len(bad) - 1} more."
            )
    return Table(x, y, tests=_tests(arrays.get("test_index"), len(x), path))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive that a table may have, within limits."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(entry.file_size for entry in file.infolist())
        if size <= 8 * MOST_VALUES:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in ("x", "y", "test_index") if key in file.files}
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, ValueError, zlib.error):
        raise ValueError(f"{path} must be a NumPy archive of numbers, got one that is damaged, or no such.") from None
    raise ValueError(f"{path} must hold at most {MOST_VALUES} numbers, got {size} bytes.")


def _tests(index: np.ndarray | None, rows: int, path: Path) -> Tensor | None:
    """Return the rows of each test split, checked."""
    if index is None:
        return None
    found = torch.from_numpy(np.array(index))
    fits = found.dim() == 2 and found.numel() > 0 and not found.is_floating_point() and found.shape[1] < rows
    if not fits or not bool(((found >= 0) & (found < rows)).all()):
        raise ValueError(
            f"test_index of {path} must hold rows of each split, (splits, m) integers from 0 to {rows - 1}, got "
            f"{index.dtype} of shape {index.shape}."
        )
    return found.long()


def read_csv(path: Path, target: Sequence[str] = (), argument: str = "data") -> Table:
    """Return the table of a CSV file: a row of names, if the first row has any, and rows of numbers.

    Args:
        path: The file, in UTF-8, with commas, semicolons or tabs between values.
        target: Names of the target columns; none for the last column.
        argument: What errors say was to name it.

    Raises:
        ValueError: If a row has text in it, a missing value, or another number of values than the first one.
        FileNotFoundError: If it is not there.
    """
    names, numbers = read_numbers(path, argument)
    if unknown := [name for name in target if name not in names]:
        raise ValueError(
            f"target must name columns of {path}, got {unknown[0]!r}.{did_you_mean(unknown[0], names)} It has "
            f"{', '.join(names)[:200] or 'no names in its first row'}."
        )
    columns = [names.index(name) for name in target] or [numbers.shape[1] - 1]
    others = [column for column in range(numbers.shape[1]) if column not in columns]
    if not others:
        raise ValueError(f"{path} must have a feature beside its target, got {numbers.shape[1]} column.")
    features, targets = (tuple(names[column] for column in part) if names else () for part in (others, columns))
    return Table(numbers[:, others], numbers[:, columns], features, targets)


def read_numbers(path: Path, argument: str = "data") -> tuple[list[str], Tensor]:
    """Return the names of a CSV file's columns, none if its first row is one of numbers, and its rows, `(n, d)`.

    Raises:
        ValueError: As for `read_csv`.
        FileNotFoundError: If it is not there.
    """
    _check_file(path, argument)
    names: list[str] = []
    values: list[float] = []
    width = 0
    for number, cells in _rows(path):
        if width == 0 and not names and any(_text(cell) for cell in cells):
            names, width = [cell.strip() for cell in cells], len(cells)
            if len(set(names)) < len(names) or not all(names):
                raise ValueError(f"{path} must name every column once in row {number}, got {', '.join(names)[:200]}.")
            continue
        width = width or len(cells)
        if len(cells) != width:
            raise ValueError(f"row {number} of {path} must have {width} values as the first one, got {len(cells)}.")
        values += [_value(cell, path, number, names[k] if names else str(k + 1)) for k, cell in enumerate(cells)]
        if len(values) > MOST_VALUES:
            raise ValueError(f"{path} must hold at most {MOST_VALUES} numbers, got more by row {number}.")
    if not values:
        raise ValueError(f"{path} must hold rows of numbers, got none.")
    return names, torch.tensor(values, dtype=torch.float64).reshape(-1, width)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a file that are not empty, each with its number, from 1."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(LONGEST_LINE + 1)
            file.seek(0)
            separator = max(",;\t", key=first.count)
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), start=1):
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"row {number} of {path} must have at most {LONGEST_LINE} characters, got more.")
                if line.strip():
                    yield number, next(csv.reader([line], delimiter=separator))
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be text in UTF-8, got other bytes.") from None
    except csv.Error as error:
        raise ValueError(f"{path} must hold comma-separated values: {error}.") from None


def _text(cell: str) -> bool:
    """Return whether a cell holds text that is no number."""
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip())
    return False


def _value(cell: str, path: Path, number: int, column: str) -> float:
    if not cell.strip():
        raise ValueError(
            f"row {number} of {path} must have a number in column {column}, got none. Fill missing values in, or leave "
            "the row out."
        )
    try:
        value = float(cell)
    except ValueError:
        raise ValueError(f"row {number} of {path} must have a number in column {column}, got {cell[:40]!r}.") from None
    if not math.isfinite(value):
        raise ValueError(f"row {number} of {path} must have a finite number in column {column}, got {cell.strip()!r}.")
    return value


def _check_file(path: Path, argument: str) -> None:
    """Refuse a file that is not there, or too large to read."""
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file, got {path}, which is not there.")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path} must have at most {LARGEST_FILE} bytes, got {size}.")
