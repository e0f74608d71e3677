"""Image classification: what its data, its metrics and its report are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from rich.console import Console
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.diagnosis.findings import guesses
from bayeslayers.display import printable
from bayeslayers.distributed import World
from bayeslayers.likelihoods import Likelihood, likelihood_of
from bayeslayers.metrics.calibration import CalibrationBins
from recipes.data.examples import Examples, InOrder
from recipes.data.image_files import ImageFiles
from recipes.data.image_loader import VariedPictures, file_batches
from recipes.data.split import Split, batches
from recipes.reports.measure import EvaluationRequest, Picture, Section, method_options
from recipes.tasks.images import Config, read_splits, read_test_splits, readable
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.loop import UNKNOWN
from recipes.training.run_folder import DEFAULT_COLUMNS, Column
from recipes.training.tally import Tally
from zoo.networks.segmentation import labels_pixels

MISTAKES = 24  # the most confident ones, which a report shows
_GUESSES = (
    ". Its predictions are no better than guessing: train longer, or choose the optimizer's settings for the number of "
    "examples, as --optimizer '{name: vogn}' does"
)


class Classification(PosteriorTask):
    """Image classification, one label of k for an image."""

    name = "classification"
    Config = Config
    columns: ClassVar[tuple[Column, ...]] = DEFAULT_COLUMNS
    logged = ("accuracy", "nll", "brier", "ece")
    reported = ("misclassification_auroc_confidence",)
    config: Config

    def read_splits(self) -> Splits:
        return read_splits(self.config, zoo.card_of(self.model).input_size)

    def check_model(self) -> None:
        self._told: set[str] = set()
        if self.config.on_error == "skip":
            self._leave_out_unreadable()
        check_classes(self.model, self.splits, self.method(trained=True))

    def _leave_out_unreadable(self) -> None:
        """Leave out the pictures to measure on that cannot be read; those to train on are met in training."""
        splits, same = self.splits, self.splits.held_out is self.splits.test

        def read(split: Examples) -> Split:
            found, faults = readable(cast(Split, split), self.world)
            self._tell(faults)
            return found

        test, ood = read(splits.test), {name: read(split) for name, split in splits.ood.items()}
        self.splits = Splits(splits.train, test if same else read(splits.held_out), splits.split, test, ood)

    def _tell(self, faults: Sequence[str]) -> None:
        """Print which pictures are left out, each once."""
        for fault in (fault for fault in faults if fault not in self._told):
            self._told.add(fault)
            Console(stderr=True).print(f"left out: {printable(fault)}", markup=False, highlight=False, soft_wrap=True)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._read(epoch, start, slice(None))

    def parts(self, epoch: int, start: int, world: World) -> Iterator[tuple[Tensor, Tensor, int]]:
        size = min(self.config.batch_size, len(self.splits.train))
        for x, y in self._read(epoch, start, world.part(size)):
            yield x, y, size if self.config.on_error == "raise" else UNKNOWN

    def _read(self, epoch: int, start: int, own: slice) -> Iterator[tuple[Tensor, Tensor]]:
        config, train = self.config, cast(Split, self.splits.train)
        where = config.batch_size, config.seed, epoch, start
        if not isinstance(train.images, ImageFiles):
            yield from batches(train, *where, config.augmentation, own)
            return
        skip, crop = config.on_error == "skip", train.crop or train.images.size[1:]
        pictures = VariedPictures(train.images, train.labels, config.augmentation, crop, skip)
        for x, y, faults in file_batches(pictures, *where, own, config.workers, config.prefetch):
            if faults:
                self._tally.sums["skipped"] += len(faults)
                self._tell(faults)
            if len(y) == 0 and self.world.size == 1:
                raise ValueError(f"a batch must hold a picture that can be read, got {len(faults)} with faults.")
            yield x, y

    def write(self, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, float]) -> str:
        left = super().write(rows, metrics)
        return left + (_GUESSES if guesses(self.result.evaluation) else "")

    def tally(self) -> Tally:
        self._tally = AccuracyTally(likelihood_of(self.model), self.config.on_error == "skip")
        return self._tally

    def card_fields(self) -> dict[str, Any]:
        return {
            "class_names": cast(Split, self.splits.test).classes,
            "resize": self.config.augmentation.resize,
        }

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        return [mistakes_section(find_mistakes(model, cast(Split, data), evaluation, request))]

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        if card.likelihood != "categorical":
            return f"posterior must be one of classes, got a {card.likelihood} one."
        if len(card.input_size) != 3:
            return f"posterior must take images, got one for inputs of shape {tuple(card.input_size)}."
        if labels_pixels(card):
            return "posterior must give a class for an image, got one that gives a class for each pixel."
        return ""

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Split, Mapping[str, Split]]:
        data, ood = read_test_splits(card, request, data_root)
        return align(data, card.class_names), ood


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train, measure and save one posterior, see `recipes.tasks.task.Task.train`."""
    return Classification(config).train(resume, command)


class AccuracyTally:
    """Accuracy and calibration of an epoch's steps, measured while the weights move, and pictures left out."""

    def __init__(self, likelihood: Likelihood, skips: bool = False):
        self.likelihood, self.bins = likelihood, CalibrationBins()
        self.sums = {"accuracy": 0.0} | ({"skipped": 0.0} if skips else {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"bins": self.bins.sums}

    def add(self, output: Tensor | None, target: Tensor) -> None:
        if output is None:
            return
        confidence, labels = self.likelihood.per_draw(output.double())[0].max(1)
        self.bins.add(confidence[:, None], (labels == target)[:, None])
        self.sums["accuracy"] += float((labels == target).float().mean())

    def means(self, steps: int) -> dict[str, float]:
        skipped = {key: value for key, value in self.sums.items() if key == "skipped"}
        return {"accuracy": self.sums["accuracy"] / steps, "ece": float(self.bins.errors())} | skipped

    def load(self, sums: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        self.sums, self.bins.sums = dict(sums), tensors["bins"]


def check_classes(model: nn.Module, splits: Splits, method: str) -> None:
    """Refuse data whose labels are not the model's outputs, and a way to predict that the model has not."""
    device = next(model.parameters()).device
    train, test = cast(Split, splits.train), cast(Split, splits.test)
    x, _ = next(iter(InOrder(test, 1, device)))
    own = torch.Generator(device)  # the training's draws of dropout stay what they are
    prediction = bl.predict(model, x, num_samples=1, method=method, generator=own)  # pyright: ignore[reportArgumentType]
    outputs, names = prediction.probs.shape[1], train.classes
    if len(names) != outputs or test.classes != names:
        other = f", of other names in the test split ({len(test.classes)})" if test.classes != names else ""
        raise ValueError(
            f"data must have a class for each of the model's {outputs} outputs, got {len(names)}{other}. Set "
            "model.num_classes, and name the classes in the data."
        )


def align(data: Split, names: Sequence[str]) -> Split:
    """Return the data with its labels numbered as the posterior's classes are."""
    if not names:
        return data
    if sorted(names) == sorted(data.classes):
        number = torch.tensor([names.index(name) for name in data.classes])
        return dataclasses.replace(data, labels=number[data.labels], classes=list(names))
    if int(data.labels.max()) >= len(names):
        some = ", ".join(data.classes[:5]) + ", ..." * (len(data.classes) > 5)
        raise ValueError(f"data must have the posterior's {len(names)} classes, got {len(data.classes)}: {some}.")
    return data if len(data.classes) >= len(names) else dataclasses.replace(data, classes=list(names))


@dataclass(frozen=True)
class Mistake:
    """An example that is predicted wrongly: its image in bytes `(c, h, w)`, its class, the predicted one."""

    image: Tensor
    label: str
    predicted: str
    confidence: float


def find_mistakes(
    model: nn.Module, data: Split, evaluation: bl.Evaluation, request: EvaluationRequest
) -> list[Mistake]:
    """Return the mistakes that other draws of the weights make too, most confident first."""
    wrong = (~evaluation.scores["correct"].bool()).nonzero().flatten()
    index = wrong[evaluation.scores["confidence"][wrong].argsort(descending=True)][:MISTAKES]
    if len(index) == 0:
        return []
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(request.seed)
    inputs, images = data.inputs(index).to(device), data.images[index]
    prediction = bl.predict(model, inputs, request.num_samples, generator=generator, **method_options(request))
    found = []
    for number, label in enumerate(data.labels[index].tolist()):
        predicted = int(prediction.labels[number])
        if predicted != label:
            true, guess = (data.classes[k] if k < len(data.classes) else str(k) for k in (label, predicted))
            found.append(Mistake(images[number], true, guess, float(prediction.confidence[number])))
    return sorted(found, key=lambda mistake: -mistake.confidence)


def mistakes_section(mistakes: Sequence[Mistake]) -> Section:
    """Return the section of a report that shows mistakes."""
    if not mistakes:
        return Section("Mistakes", "None: every example is predicted rightly.")
    pictures = [
        Picture(
            mistake.image,
            "example",
            [("predicted ", mistake.predicted, f" ({mistake.confidence:.0%})"), ("is ", mistake.label)],
        )
        for mistake in mistakes
    ]
    return Section("The most confident mistakes", pictures=pictures, layout="small")
