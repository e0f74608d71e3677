"""Text classification: sentences of a small made language, and whether their mood is good or bad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one
from bayeslayers.likelihoods import likelihood_of
from recipes.data import clauses
from recipes.data.examples import Examples, Points, held_out_index, limited_index, shuffled
from recipes.reports.measure import EvaluationRequest, Section
from recipes.tasks.classification import AccuracyTally
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.config import RunConfig
from recipes.training.run_folder import DEFAULT_COLUMNS, Column
from recipes.training.tally import Tally

MISTAKES = 12  # the most confident ones, which a report shows
TRAIN_SEED, TEST_SEED, OTHER_SEED = 0, 1, 2


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run on sentences, which the recipe makes: see `recipes.data.clauses`.

    Attributes:
        data: "clauses".
        sentences: Training sentences, validation ones among them.
        test_sentences: Test sentences, and as many out-of-distribution ones.
        recipe: Which recipe reads this configuration.
    """

    data: str = clauses.NAME
    sentences: int = 6000
    test_sentences: int = 4000
    recipe: str = "text"


class Text(PosteriorTask):
    """Classification of sentences."""

    name = "text"
    Config = Config
    columns: ClassVar[tuple[Column, ...]] = DEFAULT_COLUMNS
    logged = ("accuracy", "nll", "brier", "ece")
    reported = ("misclassification_auroc_confidence",)
    config: Config

    def check(self) -> None:
        super().check()
        at_least_one("sentences", self.config.sentences)
        at_least_one("test_sentences", self.config.test_sentences)
        _check_names(self.config.data, self.config.evaluation.ood)

    def read_splits(self) -> Splits:
        config = self.config
        _check_model(zoo.card_of(self.model))
        train = _limited(clauses.sentences(config.sentences, TRAIN_SEED), config.limit)
        test = _limited(clauses.sentences(config.test_sentences, TEST_SEED), config.limit)
        ood = {name: _other(config.test_sentences, config.limit) for name in config.evaluation.ood}
        if not config.validation:
            return Splits(train, test, "test", test, ood)
        kept, held_out = held_out_index(len(train), config.validation)
        return Splits(_taken(train, kept), _taken(train, held_out), "val", test, ood)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        train, config = self.splits.train, self.config
        for index, _ in shuffled(len(train), config.batch_size, config.seed, epoch, start):
            yield train.inputs(index), train.targets[index]

    def tally(self) -> Tally:
        return AccuracyTally(likelihood_of(self.model))

    def card_fields(self) -> dict[str, Any]:
        return {"class_names": clauses.CLASSES}

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        wrong = (~evaluation.scores["correct"].bool()).nonzero().flatten()
        most = wrong[evaluation.scores["confidence"][wrong].argsort(descending=True)][:MISTAKES]
        labels = data.targets[most]
        shown = [
            f"{float(evaluation.scores['confidence'][i]):.0%} sure of {clauses.CLASSES[1 - int(label)]}, labelled "
            f"{clauses.CLASSES[int(label)]}: {clauses.text(data.inputs(i[None])[0])}."
            for i, label in zip(most, labels, strict=True)
        ]
        told = f"{clauses.NOISE:.0%} of the labels are turned round, which no network can know. "
        return [Section("The most confident mistakes", told + " ".join(shown))]

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        if card.likelihood != "categorical" or card.input_size != [clauses.LENGTH]:
            return f"posterior must classify sentences of {clauses.LENGTH} words, got one for inputs {card.input_size}."
        return ""

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Points, Mapping[str, Points]]:
        assert request.data is not None
        _check_names(request.data, request.ood)
        count = Config.test_sentences
        test = _limited(clauses.sentences(count, TEST_SEED), request.limit)
        return test, {name: _other(count, request.limit) for name in request.ood}


def train(config: Config, resume: bool = False, command: str = "") -> dict[str, float] | None:
    """Train, measure and save one posterior, see `recipes.tasks.task.Task.train`."""
    return Text(config).train(resume, command)


def _check_names(data: str, ood: Sequence[str]) -> None:
    if data != clauses.NAME:
        raise ValueError(f"data must be {clauses.NAME!r} for text, got {data!r}.")
    if unknown := [name for name in ood if name != clauses.OTHER]:
        raise ValueError(f"evaluation.ood must be {clauses.OTHER!r} for text, got {unknown[0]!r}.")


def _check_model(card: bl.Card) -> None:
    words = card.kwargs.get("vocabulary", 0)
    if card.input_size != [clauses.LENGTH] or words < len(clauses.WORDS):
        raise ValueError(
            f"model must take sentences of {clauses.LENGTH} words out of {len(clauses.WORDS)}, got inputs of shape "
            f"{tuple(card.input_size)} and a vocabulary of {words}. Set model.input_size and model.vocabulary."
        )


def _other(count: int, limit: int | None) -> Points:
    return _limited(clauses.sentences(count, OTHER_SEED, other=True), limit)


def _limited(points: Points, limit: int | None) -> Points:
    return points if limit is None or limit >= len(points) else _taken(points, limited_index(len(points), limit))


def _taken(points: Points, index: Tensor) -> Points:
    return Points(points.x[index], points.labels[index])
