"""What `bayeslayers predict` does with a posterior of real targets: it predicts the rows of CSV files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import did_you_mean
from recipes.data.names import shortest_ends
from recipes.data.tables import read_numbers
from recipes.reports.tables import print_table

_LEVEL = 0.9  # of the interval


def predict_rows(model: nn.Module, paths: Sequence[Path], arguments: argparse.Namespace) -> int:
    """Print for each row of CSV files the predictive mean, its standard deviations and the central 90 % interval.

    Args:
        model: The posterior.
        paths: The files, with the features in the posterior's order, or with their names in the first row.
        arguments: What was typed.
    """
    card, device = zoo.card_of(model), next(model.parameters()).device
    tables = [read_features(path, card) for path in paths]
    prediction = bl.predict(
        model,
        torch.cat(tables),
        arguments.num_samples,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        batch_size=4096,
        method=arguments.method or card.method,  # pyright: ignore[reportArgumentType]
        result_device="cpu",
    )
    low, high = prediction.quantile([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    columns = {
        "mean": prediction.mean,
        "sd": prediction.total.sqrt(),
        "low": low,
        "high": high,
        "aleatoric_sd": prediction.aleatoric.sqrt(),
        "epistemic_sd": prediction.epistemic.sqrt(),
    }
    short = shortest_ends([path.absolute().parts[1:] for path in paths])
    places = [(name, row) for name, table in zip(short, tables, strict=True) for row in range(1, len(table) + 1)]
    rows = [
        {"file": file, "row": row} | {name: _number(values[i]) for name, values in columns.items()}
        for i, (file, row) in enumerate(places)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    shown = [(f"{row['file']} {row['row']}", *(_text(row[name]) for name in columns)) for row in rows]
    print_table(("row", *columns), shown)
    return 0


def read_features(path: Path, card: bl.Card) -> Tensor:
    """Return the features of a CSV file's rows, float32 `(n, d)`: by their names if both know them, else by order.

    Raises:
        ValueError: If a column is missing, or the file has another number of columns.
    """
    names, numbers = read_numbers(path, "table")
    features = [str(name) for name in card.kwargs.get("features", ())]
    if names and features:
        if missing := [name for name in features if name not in names]:
            raise ValueError(
                f"{path} must have the posterior's columns, got none of the name {missing[0]!r}."
                f"{did_you_mean(missing[0], names)}"
            )
        return numbers[:, [names.index(name) for name in features]].float()
    if numbers.shape[1] != card.input_size[0]:
        raise ValueError(
            f"{path} must have the posterior's {card.input_size[0]} features and no other column, got "
            f"{numbers.shape[1]} columns."
        )
    return numbers.float()


def _number(value: Tensor) -> Any:
    """Return the number of one target, or those of several, as they are printed."""
    found = [float(f"{number:.6g}") for number in value.flatten().tolist()]
    return found[0] if len(found) == 1 else found


def _text(value: Any) -> str:
    return ", ".join(f"{number:.4g}" for number in (value if isinstance(value, list) else [value]))
