"""Diagnosis of a posterior: what its layers hold, what sampling does to predictions, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bayeslayers.batches import Labelled
from bayeslayers.diagnosis.findings import Finding, of_predictions, of_weights
from bayeslayers.diagnosis.tensors import TensorDiagnosis, tensors_of
from bayeslayers.display import as_text, printable
from bayeslayers.evaluate import Evaluation, evaluate
from bayeslayers.optim import IVON, OGN, VOGN
from bayeslayers.prediction.result import without_nan

if TYPE_CHECKING:
    from rich.console import Group

_ROWS = 40  # of a printed table
_COLUMNS = {
    "size": "size",
    "signal_to_noise": "signal / noise",
    "undecided": "undecided",
    "precision_over_prior": "precision / prior",
    "untouched": "untouched",
    "at_prior": "at prior",
    "effective_lr": "effective lr",
}


@dataclass(frozen=True)
class Diagnosis:
    """The state of a posterior; it prints as a table and sentences.

    Attributes:
        tensors: Each uncertain tensor.
        means: Evaluation of the posterior means; None without data.
        samples: Evaluation by posterior samples; None without data.
    """

    tensors: tuple[TensorDiagnosis, ...]
    means: Evaluation | None = None
    samples: Evaluation | None = None

    @property
    def findings(self) -> list[Finding]:
        """What stands out, the most serious first; empty if nothing does."""
        found = [*of_weights(self.tensors)]
        if self.means is not None and self.samples is not None:
            found += of_predictions(self.means, self.samples)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, texts and lists, ready for JSON: None stands for NaN."""
        rows = [{key: without_nan(value) for key, value in asdict(tensor).items()} for tensor in self.tensors]
        plain: dict[str, Any] = {"tensors": rows, "findings": [asdict(finding) for finding in self.findings]}
        for name in ("means", "samples"):
            if (evaluation := getattr(self, name)) is not None:
                plain[name] = {key: without_nan(value) for key, value in evaluation.metrics.items()}
        return plain

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows, caption = self.tensors, None
        if len(rows) > _ROWS:
            noisiest = set(sorted(rows, key=lambda tensor: tensor.undecided)[-_ROWS:])
            rows, caption = [t for t in rows if t in noisiest], f"The {_ROWS} noisiest of {len(rows)} tensors."
        table = Table("tensor", caption=caption)
        columns = [name for name in _COLUMNS if not all(math.isnan(getattr(t, name)) for t in rows)]
        for name in columns:
            table.add_column(_COLUMNS[name], justify="right")
        for tensor in rows:
            values = (_shown(name, getattr(tensor, name)) for name in columns)
            table.add_row(Text(printable(tensor.name), overflow="fold"), *values)
        lines = [f"{finding.problem}: {finding.text}" for finding in self.findings] or ["Nothing stands out."]
        return Group(table, *(Text(printable(line)) for line in [*self._compared(), *lines]))

    def __str__(self) -> str:
        return as_text(self)

    def _compared(self) -> list[str]:
        """Return one line with the metrics of means and samples."""
        if self.means is None or self.samples is None:
            return []
        metrics = [key for key in ("accuracy", "rmse", "nll", "ece") if key in self.samples.metrics]
        shown = (f"{key} {self.means.metrics[key]:.4g} -> {self.samples.metrics[key]:.4g}" for key in metrics)
        return [f"means -> {self.samples.num_samples} samples: {', '.join(shown)}."]


def diagnose(
    model: nn.Module,
    data: Labelled | None = None,
    *,
    optimizer: VOGN | OGN | IVON | None = None,
    num_samples: int = 32,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Diagnosis:
    """Return what a posterior's tensors hold, and whether it is too wide, too narrow or untouched by the data.

    Signal-to-noise ratios are those of Blundell et al. 2015 (arXiv 1505.05424), Sec. 5.1. The bounds of the findings
    are rules of thumb, chosen so that the bundled posteriors have none that is false.

    Args:
        model: Model with Bayesian layers.
        data: Held-out data `(x, y)`, or a loader that can be read twice: once by means, once by samples.
        optimizer: The optimiser that trains the model, for the effective learning rates.
        num_samples: Posterior samples per batch.
        generator: Source of the samples.
        **options: Further arguments of `evaluate`.

    Raises:
        TypeError: If `data` can be read only once, or the optimizer is of another kind.
        ValueError: If the model has no Bayesian layers, or data does not fit it.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = bl.BayesLinear(4, 3)  # not trained
        >>> [finding.problem for finding in bl.diagnose(net).findings]
        ['never updated']
    """
    if optimizer is not None and not isinstance(optimizer, VOGN | OGN | IVON):
        raise TypeError(f"optimizer must be VOGN, OGN or IVON, got {type(optimizer).__name__}.")
    if isinstance(data, Iterator):
        raise TypeError("data must be read twice, got an iterator. Pass the loader, or one tuple (x, y).")
    means = samples = None
    if data is not None:
        means = evaluate(model, data, method="mean", **options)
        samples = evaluate(model, data, num_samples=num_samples, generator=generator, **options)
    return Diagnosis(tuple(tensors_of(model, optimizer)), means, samples)


def _shown(name: str, value: float) -> str:
    if name == "size":
        return f"{value:,}"
    return f"{value:.0%}" if name in ("undecided", "untouched", "at_prior") else f"{value:.3g}"
