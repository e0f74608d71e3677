"""Evaluation: all metrics of a posterior on labelled data, and its OOD detection, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslayers.batches import Labelled, Unlabelled, input_batches, labelled_batches, with_progress
from bayeslayers.corruptions import KINDS, SEVERITIES, check_images, check_kinds, corrupted_batches
from bayeslayers.display import as_text, printable
from bayeslayers.distributed import is_distributed
from bayeslayers.inputs import Batch, Inputs
from bayeslayers.likelihoods import Gaussian, Likelihood, likelihood_of
from bayeslayers.method import method_of
from bayeslayers.metrics.calibration import Reliability
from bayeslayers.metrics.classification import ClassificationRecord
from bayeslayers.metrics.corrupted import CorruptionMetrics
from bayeslayers.metrics.elements import RANKED, as_uncertainty, per_example, uncertainties
from bayeslayers.metrics.ranking import RiskCoverage, two_sets
from bayeslayers.metrics.regression import RegressionRecord
from bayeslayers.prediction import Prediction, predict
from bayeslayers.prediction.result import without_nan
from bayeslayers.prediction.shared import shared_predictions, skip_samples
from bayeslayers.recalibrate import Recalibration

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; it prints as a table.

    Attributes:
        likelihood: "categorical", "bernoulli" or "gaussian".
        num_examples: Examples with a label that counts, or images of a segmentation.
        num_samples: Posterior samples averaged; 1 for the posterior means.
        metrics: Metrics by name. NaN marks one that the data leaves undefined, such as an AUROC without errors.
        reliability: Reliability diagram of the confidence; None for real targets.
        risk_coverage: Error rate of the most confident predictions; None for real targets.
        scores: Per example, float32 on the CPU: "confidence", "entropy", "epistemic", "aleatoric", and "correct"
            (bool, or the share of right positions); for real targets "residual" (the root mean square where an
            example has several), "variance", "epistemic", "aleatoric".
        ood: The same uncertainties for each out-of-distribution set.
        class_iou: Intersection over union of each class of a segmentation, NaN for a class without any; else None.
        corruptions: Metrics of corrupted images by kind and severity; None where they were not asked for.
        num_classes: Classes of a label, 2 for binary ones; None for real targets.
    """

    likelihood: str
    num_examples: int
    num_samples: int
    metrics: dict[str, float]
    reliability: Reliability | None = None
    risk_coverage: RiskCoverage | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    ood: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    class_iou: Tensor | None = None
    corruptions: CorruptionMetrics | None = None
    num_classes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics and the reliability diagram, ready for JSON: None stands for NaN."""
        plain: dict[str, Any] = {
            "likelihood": self.likelihood,
            "num_examples": self.num_examples,
            "num_samples": self.num_samples,
            "metrics": {key: without_nan(value) for key, value in self.metrics.items()},
        }
        if self.reliability is not None:
            plain["reliability"] = {key: without_nan(value.tolist()) for key, value in vars(self.reliability).items()}
        if self.class_iou is not None:
            plain["class_iou"] = without_nan(self.class_iou.tolist())
        if self.corruptions is not None:
            plain["corruptions"] = self.corruptions.to_dict()
        return plain

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        plural = "s" * (self.num_samples > 1)
        caption = f"{self.likelihood}, {self.num_examples:,} examples, {self.num_samples} sample{plural}."
        table = Table("metric", caption=caption)
        table.add_column("value", justify="right")
        for key, value in self.metrics.items():
            table.add_row(Text(printable(key), overflow="fold"), f"{value:.4g}")
        return Group(table, *([] if self.corruptions is None else [self.corruptions]))

    def __str__(self) -> str:
        return as_text(self)


def evaluate(
    model: nn.Module,
    data: Labelled,
    *,
    ood: Mapping[str, Unlabelled] | None = None,
    corruptions: bool | Sequence[str] = False,
    num_samples: int = 64,
    likelihood: Likelihood | None = None,
    generator: torch.Generator | None = None,
    ignore_index: int | None = None,
    recalibration: Recalibration | None = None,
    progress: bool = False,
    sync: bool = False,
    **options: Any,
) -> Evaluation:
    """Return how well the posterior predicts labelled data, and how well it detects out-of-distribution data.

    Data is streamed: memory holds one batch and a few numbers per example, and counts in bins for segmentation.

    Multi-class and binary classification: accuracy; nll; brier (the squared distance to the one-hot label; (p - y)^2
    if binary); ece, adaptive_ece and classwise_ece; misclassification_auroc_SCORE and misclassification_fpr95_SCORE,
    how well each score finds errors; aurc and coverage_at_risk_RISK of the confidence. With several labels per
    example, as in segmentation, metrics are over positions; adaptive_ece is left out, and miou is added, the mean of
    `class_iou` over the classes that occur. Regression: rmse; nll, crps and coverage_LEVEL of the central interval,
    under the Gaussian of the predictive mean and variance; mixture_nll, under the mixture of all samples. OOD
    detection: NAME/auroc_SCORE, NAME/fpr95_SCORE. Corruptions: corrupted_accuracy, corrupted_nll and corrupted_ece,
    means over kinds and severities; `corruptions` has each.

    Scores are confidence, entropy (total uncertainty) and epistemic (the mutual information); for regression they
    are variance and epistemic. docs/evaluation.md defines every metric and names its source.

    Args:
        model: Model with Bayesian layers.
        data: A loader or other iterable of batches (x, y), or one tuple (x, y). x is a tensor, `Inputs`, a mapping of
            keyword arguments or a tuple of positional ones; a batch may also be one mapping with a key "labels".
        ood: Out-of-distribution data by name: iterables of x or (x, y), or one batch x.
        corruptions: True also evaluates images in [0, 1] with each of the 15 corruptions of `corrupt` at 5 severities;
            a list of names takes some of them. `data` is read once more for each. The corrupted images depend on the
            seed of the generator (0 without one) and on the batches, not on the model.
        num_samples: Posterior samples per batch.
        likelihood: As for `predict`.
        generator: Source of the samples; every batch has its own.
        ignore_index: Label that all metrics leave out; None for that of the likelihood, if it has one.
        recalibration: Applied to every prediction, if given.
        progress: Whether to show a progress bar.
        sync: Share the batches among the ranks of torch.distributed's default group: with k ranks each passes every
            k-th batch of `data` and `ood`, from that of its own number on, and all return what one process would.
        **options: Further arguments of `predict`, such as `method`, `output` and `batch_size`.

    Raises:
        TypeError: If `data` or `ood` yields no tensors; with corruptions, if `data` can be read only once.
        ValueError: If one is empty, targets do not fit the predictions, or predictions are not finite; if a kind of
            corruption is unknown, inputs are not images in [0, 1], or targets are real.

    Example:
        >>> import torch, bayeslayers as bl
        >>> model, x, y = bl.BayesLinear(4, 3), torch.randn(20, 4), torch.arange(20) % 3
        >>> evaluation = bl.evaluate(model, (x, y), ood={"far": 10 * x}, num_samples=8)
        >>> sorted(evaluation.scores)
        ['aleatoric', 'confidence', 'correct', 'entropy', 'epistemic']
        >>> 0 <= evaluation.metrics["far/auroc_epistemic"] <= 1
        True
    """
    if not isinstance(ood, Mapping | None):
        raise TypeError(f"ood must map names to data, got {type(ood).__name__}. Write ood={{'name': data}}.")
    likelihood = likelihood or likelihood_of(model)
    kinds = _kinds(corruptions, data, likelihood)
    options["method"] = options.get("method") or method_of(model)  # every batch by whole networks
    if ignore_index is None:
        ignore_index = getattr(likelihood, "ignore_index", None)

    def predicted(x: Batch, target: Tensor | None = None) -> Prediction:
        prediction = predict(
            model, x, num_samples, likelihood=likelihood, generator=generator, target=target, **options
        )
        return prediction if recalibration is None else recalibration.apply(prediction)

    skip = partial(skip_samples, model, num_samples, generator, options)

    def in_order(batches: Iterable[tuple[Batch, Tensor | None]]) -> Iterator[tuple[Prediction, Tensor | None]]:
        found = (partial(_predicted_batch, predicted, likelihood, *batch) for batch in batches)
        return shared_predictions(found, skip, likelihood) if sync and is_distributed() else (make() for make in found)

    def recorded(batches: Iterable[tuple[Batch, Tensor]]) -> tuple[ClassificationRecord | RegressionRecord, int]:
        record, samples = None, 0
        for prediction, y in in_order(batches):
            assert y is not None
            if record is None:
                record = ClassificationRecord(prediction, ignore_index) if likelihood.discrete else RegressionRecord()
            record.add(prediction, y)
            samples = max(samples, prediction.num_samples)
        assert record is not None
        return record, samples

    def labelled(name: str) -> Iterator[tuple[Any, Tensor]]:
        for x, y in labelled_batches("data", _shown(data, name, progress), sync):
            if kinds:
                check_images(x)
            yield x, y

    record, samples = recorded(labelled("data"))
    scores, metrics, ood_scores = record.scores(), record.metrics(), {}
    for name, inputs in (ood or {}).items():
        batches = ((x, None) for x in input_batches(f"ood[{name!r}]", _shown(inputs, name, progress), sync))
        ood_scores[name] = _scores(prediction for prediction, _ in in_order(batches))
        metrics |= _ood_detection(name, scores, ood_scores[name], RANKED[likelihood.discrete])
    common = likelihood.name, record.num_examples, samples, metrics
    if isinstance(record, RegressionRecord):
        return Evaluation(*common, scores=scores, ood=ood_scores)
    corrupted = None
    if kinds:
        seed = 0 if generator is None else generator.initial_seed()
        own = (dist.get_rank(), dist.get_world_size()) if sync and is_distributed() else (0, 1)

        def fit(kind: str, severity: int) -> dict[str, float]:
            batches = corrupted_batches(labelled(f"{kind} {severity}"), kind, severity, seed, *own)
            found, _ = recorded(batches)
            assert isinstance(found, ClassificationRecord)
            return found.fit()

        corrupted = CorruptionMetrics.of(metrics, {kind: [fit(kind, level) for level in SEVERITIES] for kind in kinds})
        metrics |= corrupted.summary()
    iou = record.class_iou() if record.dense else None
    return Evaluation(
        *common, record.reliability(), record.risk_coverage(), scores, ood_scores, iou, corrupted, record.num_classes
    )


def _kinds(corruptions: bool | Sequence[str], data: Labelled, likelihood: Likelihood) -> tuple[str, ...]:
    """Return the kinds of corruption that are asked for, none for False.

    Raises:
        TypeError: If data can be read only once.
        ValueError: If a kind is unknown, or targets are real.
    """
    if corruptions is False:
        return ()
    kinds = check_kinds("corruptions", KINDS if corruptions is True else corruptions)
    if isinstance(data, Iterator):
        raise TypeError("data must be read once for each corruption, got an iterator. Pass the loader, or one (x, y).")
    if not likelihood.discrete:
        raise ValueError(f"corruptions must be left out for real targets, got {len(kinds)} of them.")
    return kinds


def _predicted_batch(
    predicted: Callable[..., Prediction], likelihood: Likelihood, x: Batch, y: Tensor | None
) -> tuple[Prediction, Tensor | None]:
    """Return the prediction of a batch, under its targets where they are real, and these."""
    return predicted(x, y if isinstance(likelihood, Gaussian) else None), y


def _scores(predictions: Iterable[Prediction]) -> dict[str, Tensor]:
    """Return the uncertainties per example of all predictions."""
    parts = [{key: per_example(value) for key, value in uncertainties(p).items()} for p in predictions]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _ood_detection(
    name: str, known: Mapping[str, Tensor], ood: Mapping[str, Tensor], ranked: Iterable[str]
) -> dict[str, float]:
    """Return how well each score separates one out-of-distribution set from the known examples."""
    levels = {key: two_sets(*(as_uncertainty(key, scores[key]) for scores in (known, ood))) for key in ranked}
    return {f"{name}/auroc_{key}": level.auroc() for key, level in levels.items()} | {
        f"{name}/fpr95_{key}": level.false_positive_rate() for key, level in levels.items()
    }


def _shown(data: Any, name: str, progress: bool) -> Any:
    """Return `data`, whose batches move a progress bar if wanted."""
    if not progress or isinstance(data, tuple | Tensor | Inputs | Mapping) or not isinstance(data, Iterable):
        return data
    return with_progress(name, data)
