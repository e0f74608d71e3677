"""The result of `predict`: the predictive mean, its decomposed uncertainty, and what can be derived from them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslayers.checks import at_least_one, fraction
from bayeslayers.display import as_text
from bayeslayers.likelihoods import Bernoulli, Categorical, Likelihood

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]
    from rich.table import Table

_PARTS = ("mean", "total", "aleatoric", "epistemic", "standard_error")
_ROWS = 20  # of a printed table


@dataclass(frozen=True)
class Prediction:
    """The posterior predictive distribution of n examples; it prints as a table.

    With p_s the predictive distribution under sample s of the weights, the uncertainties per
    example, or per position of a dense output, are:

        classification   total = H(mean_s p_s)   aleatoric = mean_s H(p_s)
        regression       total = the sum         aleatoric = mean_s Var[p_s]   epistemic = Var_s E[p_s]

    In the first row epistemic is the difference, the mutual information of label and weights.
    Sources: Depeweg et al. 2018 (arXiv 1710.07283), Eq. 4, and Houlsby et al. 2011 (arXiv 1112.5745)
    for entropies; Kendall & Gal 2017 (arXiv 1703.04977), Eq. 9, for variances. Each of
    `bayeslayers.likelihoods` has its own definition in its docstring.

    Attributes:
        mean: Posterior predictive mean: class probabilities `(n, c, *)`, the probability of label 1
            `(n, *)`, or the mean of a real target.
        total: Total uncertainty: an entropy in nats `(n, *)`, or a variance.
        aleatoric: The uncertainty from noise in the data, which more training data would not remove.
        epistemic: The uncertainty about the weights, `total - aleatoric`, >= 0.
        standard_error: Monte-Carlo standard error of `mean`; NaN for a single sample, and for methods
            that do not sample.
        num_samples: Samples averaged, in the batch that took the most.
        likelihood: The likelihood that gives these numbers their meaning.
        samples_per_batch: Samples averaged in each batch; they differ under a tolerance.
        log_prob: Log density of the target of each example under the mixture of all samples, `(n,)`, in nats per
            example; None where `predict` got no target.
    """

    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    standard_error: Tensor
    num_samples: int
    likelihood: Likelihood
    samples_per_batch: tuple[int, ...] = ()
    log_prob: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def probs(self) -> Tensor:
        """Probabilities, `(n, c, *)` for classes, `(n, *)` for binary labels."""
        if not self.likelihood.discrete:
            raise AttributeError("probs: a Gaussian prediction has a mean and variances, no probabilities.")
        return self.mean

    @property
    def labels(self) -> Tensor:
        """The most probable class; for binary labels 1 where its probability exceeds 0.5."""
        return (self.probs > 0.5).long() if isinstance(self.likelihood, Bernoulli) else self.probs.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Probability of `labels`, in [0, 1]."""
        if isinstance(self.likelihood, Bernoulli):
            return torch.maximum(self.probs, 1 - self.probs)
        return self.probs.amax(1)

    def top_k(self, k: int = 5) -> tuple[Tensor, Tensor]:
        """Return the k greatest class probabilities and their classes, both `(n, k, *)`, greatest first."""
        probs = self._class_probs("top_k")
        if at_least_one("k", k) > probs.shape[1]:
            raise ValueError(f"k must be at most the number of classes, {probs.shape[1]}, got {k}.")
        values, classes = probs.topk(k, dim=1)
        return values, classes

    def credible_set(self, alpha: float = 0.05) -> Tensor:
        """Return the smallest set of classes that contains the label with probability 1 - alpha, a mask `(n, c, *)`.

        The probability is the model's own. `bl.conformal` guarantees coverage by calibration data.

        Args:
            alpha: Probability that may be left out, in [0, 1); 0 keeps every class of non-zero probability.
        """
        probs, order = self._class_probs("credible_set").sort(dim=1, descending=True)
        before = probs.cumsum(1) - probs  # the probability of the more probable classes
        kept = (before < 1 - fraction("alpha", alpha)) & (probs > 0)
        return torch.zeros_like(kept).scatter(1, order, kept)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Return quantiles of a real target, under the Gaussian with the predictive mean and total variance.

        The predictive distribution is a mixture of one Gaussian per sample. The prediction keeps its first
        two moments, which this Gaussian shares.

        Args:
            q: Probability in (0, 1), or several of them; these become a new dimension 0.
        """
        if self.likelihood.discrete:
            raise AttributeError(f"quantile: a {self.likelihood.name} prediction has probabilities, not quantiles.")
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.mean.device)
        if levels.dim() > 1 or not ((levels > 0) & (levels < 1)).all():
            raise ValueError(f"q must be in (0, 1), a number or a sequence of them, got {q}.")
        z = torch.special.ndtri(levels).to(self.mean.dtype)
        return self.mean + z.reshape(*levels.shape, *[1] * self.mean.dim()) * self.total.sqrt()

    def abstain(self, threshold: float | None = None, *, coverage: float | None = None) -> Tensor:
        """Return where to abstain, a mask `(n, *)`: selective prediction by confidence, or by variance.

        Source: the selection function of Geifman & El-Yaniv 2017 (arXiv 1705.08500).

        Args:
            threshold: Abstain below this confidence; for a real target, above this total variance.
            coverage: Or the share of predictions to keep, in (0, 1]. The least uncertain ones are kept; ties go to
                the earlier ones.

        Raises:
            ValueError: Unless exactly one of the two is given, within its range.
        """
        if (threshold is None) == (coverage is None):
            raise ValueError(f"give either threshold or coverage, got threshold={threshold}, coverage={coverage}.")
        uncertainty = 1 - self.confidence if self.likelihood.discrete else self.total
        if coverage is None:
            assert threshold is not None
            return uncertainty > threshold if not self.likelihood.discrete else self.confidence < threshold
        kept = round(fraction("coverage", coverage, one=True) * uncertainty.numel())
        order = uncertainty.flatten().argsort(stable=True)
        abstains = torch.ones_like(order, dtype=torch.bool)
        abstains[order[:kept]] = False
        return abstains.view(uncertainty.shape)

    def to(self, device: torch.device | str) -> Prediction:
        """Return the same prediction with its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in _PARTS}
        return dataclasses.replace(self, **moved, log_prob=None if self.log_prob is None else self.log_prob.to(device))

    def to_dict(self) -> dict[str, Any]:
        """Return all values as numbers and lists, ready for JSON: None stands for NaN."""
        named = {"labels": self.labels, "confidence": self.confidence} if self.likelihood.discrete else {}
        tensors = {name: getattr(self, name) for name in _PARTS} | named
        return {
            "likelihood": self.likelihood.name,
            "num_samples": self.num_samples,
            "samples_per_batch": list(self.samples_per_batch),
            **{name: without_nan(tensor.tolist()) for name, tensor in tensors.items()},
        }

    def to_pandas(self) -> DataFrame:
        """Return a pandas table with a row per example, or per position of a dense output; needs pandas.

        Each class has a column `prob_K`. The index holds the example, and the position if there are several.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("to_pandas needs pandas, which is not installed. pip install pandas.") from None
        names, positions = ["label", "confidence"] if self.likelihood.discrete else ["mean"], self.total.shape[1:]
        columns = {"label": "labels"}
        table = {name: getattr(self, columns.get(name, name)) for name in names}
        table |= {name: getattr(self, name) for name in _PARTS[1:4]}
        if isinstance(self.likelihood, Categorical):
            table |= {f"prob_{k}": probs for k, probs in enumerate(self.mean.unbind(1))}
        else:
            table |= {"prob": self.mean} if self.likelihood.discrete else {}
            table |= {"standard_error": self.standard_error}
        index = pandas.MultiIndex.from_tuples(
            list(itertools.product(*map(range, self.total.shape))),
            names=["example", *(f"position_{i}" for i in range(1, len(positions) + 1))],
        )
        index = index.get_level_values(0) if not positions else index
        return pandas.DataFrame({name: part.flatten().cpu().numpy() for name, part in table.items()}, index=index)

    def table(self, class_names: Sequence[str] | None = None) -> Table:
        """Return a table of the first examples for the terminal; positions of a dense output are averaged.

        Args:
            class_names: Names to show instead of class numbers.
        """
        from rich.table import Table

        dense, classes = self.total.dim() > 1, self.likelihood.discrete
        shown = min(len(self), _ROWS)
        caption = f"{self.likelihood.name}, {len(self):,} examples, {self.num_samples} samples."
        table = Table("example", caption=caption if shown == len(self) else f"{caption} The first {shown}.")
        names = ["confidence" if classes else "mean", *_PARTS[1:4]]
        for name in ([] if dense or not classes else ["label"]) + names:
            table.add_column(name, justify="right")
        values = {
            name: getattr(self, name)[:shown].flatten(1).mean(1) if dense else getattr(self, name) for name in names
        }
        for i in range(shown):
            label = [] if dense or not classes else [int(self.labels[i])]
            named = [class_names[k] if class_names else str(k) for k in label]
            table.add_row(str(i), *named, *(f"{float(values[name][i]):.4f}" for name in names))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self)

    def _class_probs(self, name: str) -> Tensor:
        if not isinstance(self.likelihood, Categorical):
            raise AttributeError(f"{name}: a {self.likelihood.name} prediction has no classes.")
        return self.mean


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Return the prediction of several batches as one."""
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _PARTS}
    counts = tuple(count for part in parts for count in part.samples_per_batch)
    scored = [part.log_prob for part in parts if part.log_prob is not None]
    log_prob = torch.cat(scored) if scored else None
    return dataclasses.replace(
        parts[0], **tensors, num_samples=max(counts), samples_per_batch=counts, log_prob=log_prob
    )


def without_nan(value: Any) -> Any:
    """Return a number, or nested lists of them, with None in place of NaN, which JSON does not have."""
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if value != value else value  # only NaN differs from itself
