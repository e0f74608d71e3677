"""Semantic segmentation: a class for each pixel of a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import non_negative
from bayeslayers.display import printable
from bayeslayers.distributed import World
from bayeslayers.storage.card import likelihood_fields
from recipes.data.augmentation import SceneAugmentation
from recipes.data.examples import Examples
from recipes.data.segmentation_files import IGNORED, Scenes, batches
from recipes.data.segmentation_sets import SETS, load_scenes
from recipes.reports.measure import EvaluationRequest, Section
from recipes.reports.scenes import scene_sections
from recipes.tasks.posterior_task import PosteriorTask, Splits
from recipes.training.config import Evaluation, RunConfig
from recipes.training.run_folder import Column
from recipes.training.tally import Tally
from zoo.networks.segmentation import labels_pixels
from zoo.registry import describe

_OVERLAP = 0.25  # of the windows by which a picture is measured


@dataclass(kw_only=True)
class Config(RunConfig):
    """A run on pictures with a class for each pixel. A `~` that a path begins with is the home folder.

    Attributes:
        augmentation: How training images are varied.
        class_weights: Weight of each class in the loss; None for those of `class_balance`.
        class_balance: Weigh each class by the share of its training pixels to the power of minus this, >= 0; 0 for
            equal weights.
        on_error: "raise" for a picture that cannot be read, or whose mask does not fit; or "skip" such pictures,
            and count them. All files are then decoded once before the training.
        half: Store the posterior in half precision, see `bl.save_posterior`.
        recipe: Which recipe reads this configuration.
    """

    augmentation: SceneAugmentation = field(default_factory=SceneAugmentation)
    class_weights: list[float] | None = None
    class_balance: float = 0.0
    on_error: Literal["raise", "skip"] = "raise"
    half: bool = False
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(num_samples=16, epoch_samples=2, batch_size=1))
    recipe: str = "segmentation"


class Segmentation(PosteriorTask):
    """Segmentation, one label of k for each pixel that has one.

    Pictures are measured and predicted window by window, at the size of the network's inputs, and compared with their
    masks at the masks' own size.
    """

    name = "segmentation"
    Config = Config
    columns: ClassVar[tuple[Column, ...]] = (
        Column("miou", "mIoU", "higher", percent=True),
        Column("accuracy", "pixel accuracy", "higher", percent=True),
        Column("nll", "NLL", unit="nats"),
        Column("ece", "ECE"),
        Column("misclassification_auroc_entropy", "AUROC errors", "higher", digits=3),
    )
    logged = ("miou", "accuracy", "nll", "ece")
    reported = ("brier", "misclassification_auroc_entropy", "misclassification_auroc_confidence")
    largest_batch = 4
    config: Config

    def check(self) -> None:
        super().check()
        config = self.config
        config.augmentation.check()
        non_negative("class_balance", config.class_balance)
        if config.class_weights is not None and config.class_balance:
            raise ValueError("class_weights must be None where class_balance is given. Leave one of them out.")
        if (groups := config.optimizer.get("num_mc_groups", 1)) != 1:
            raise ValueError(
                f"optimizer.num_mc_groups must be 1 for {self.name}, whose labels weigh the parts of a batch "
                f"differently, got {groups}. Use num_samples."
            )
        if config.evaluation.ood:
            raise ValueError(f"evaluation.ood must be empty for {self.name}, got {', '.join(config.evaluation.ood)}.")

    def read_splits(self) -> Splits:
        config, size = self.config, zoo.card_of(self.model).input_size
        if len(size) != 3 or size[0] != 3:
            raise ValueError(f"model must take RGB images (3, h, w), got one for inputs of shape {tuple(size)}.")
        load = partial(load_scenes, config.data, config.data_root, skip=config.on_error == "skip")
        train, test = load("train").limited(config.limit), load("test").limited(config.limit)
        if config.validation:
            train, held_out, split = *train.held_out(config.validation), "val"
        elif SETS[config.data].own_val:
            held_out, split = load("val").limited(config.limit), "val"
        else:
            held_out, split = test, "test"
        if skipped := [fault for scenes in (train, test, held_out) for fault in scenes.skipped]:
            self.config = dataclasses.replace(config, notes=_with_skipped(config.notes, skipped))
        if config.class_weights is not None and len(config.class_weights) != len(train.classes):
            raise ValueError(
                f"class_weights must have one for each of the {len(train.classes)} classes of {config.data}, got "
                f"{len(config.class_weights)}."
            )
        weights = config.class_weights or train.class_weights(config.class_balance)
        likelihood = bl.Categorical(IGNORED, weights)
        describe(self.model, dataclasses.replace(zoo.card_of(self.model), **likelihood_fields(likelihood)))
        return Splits(train, held_out, split, test, {})

    def check_model(self) -> None:
        device, size = next(self.model.parameters()).device, zoo.card_of(self.model).input_size
        classes = cast(Scenes, self.splits.train).classes
        own = torch.Generator(device)  # the training's draws of dropout stay what they are
        how: Any = self.method(trained=True)
        blank = torch.zeros(1, *size, device=device)
        shape = bl.predict(self.model, blank, num_samples=1, method=how, generator=own).mean.shape
        if shape != (expected := (1, len(classes), *size[1:])):
            raise ValueError(
                f"model must have an output for each of {len(classes)} classes at each pixel, {expected}, got "
                f"{tuple(shape)}. Set model.num_classes, and choose a network for segmentation."
            )

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._crops(epoch, start, slice(None))

    def parts(self, epoch: int, start: int, world: World) -> Iterator[tuple[Tensor, Tensor, int]]:
        size = min(self.config.batch_size, len(self.splits.train))
        for x, y in self._crops(epoch, start, world.part(size)):
            yield x, y, size

    def _crops(self, epoch: int, start: int, own: slice) -> Iterator[tuple[Tensor, Tensor]]:
        config, train = self.config, cast(Scenes, self.splits.train)
        height, width = config.augmentation.crop or zoo.card_of(self.model).input_size[1:]
        return batches(train, config.batch_size, config.seed, epoch, start, config.augmentation, (height, width), own)

    def tally(self) -> Tally:
        return PixelTally(len(cast(Scenes, self.splits.train).classes))

    def card_fields(self) -> dict[str, Any]:
        return {"class_names": cast(Scenes, self.splits.test).classes, "half": self.config.half}

    @classmethod
    def as_measured(cls, model: nn.Module) -> nn.Module:
        return bl.SlidingWindow(model, zoo.card_of(model).input_size[1:], _OVERLAP)

    @classmethod
    def sections(
        cls, model: nn.Module, request: EvaluationRequest, data: Examples, evaluation: bl.Evaluation
    ) -> Sequence[Section]:
        return scene_sections(cls.as_measured(model), request, cast(Scenes, data), evaluation)

    @classmethod
    def refusal(cls, card: bl.Card) -> str:
        if card.likelihood != "categorical" or not labels_pixels(card):
            return "posterior must give a class for each pixel, got one that does not."
        return ""

    @classmethod
    def read_test_splits(
        cls, card: bl.Card, request: EvaluationRequest, data_root: str | Path | None
    ) -> tuple[Scenes, Mapping[str, Scenes]]:
        if request.ood:
            raise ValueError(f"ood must be left out for segmentation, got {', '.join(request.ood)}.")
        assert request.data is not None
        scenes = load_scenes(request.data, data_root, "test")
        if card.class_names and card.class_names != scenes.classes:
            raise ValueError(
                f"data must have the posterior's classes, {', '.join(card.class_names[:5])}, ..., got those of "
                f"{request.data}: {', '.join(scenes.classes[:5])}, ...."
            )
        return scenes.limited(request.limit), {}


class PixelTally:
    """Pixel accuracy and mIoU of an epoch's steps, measured while the weights move."""

    sums: dict[str, float]
    tensors: dict[str, Tensor]

    def __init__(self, num_classes: int):
        self.sums, self.tensors = {}, {"confusion": torch.zeros(num_classes, num_classes, dtype=torch.float64)}

    def add(self, output: Tensor | None, target: Tensor) -> None:
        if output is None:
            return
        confusion, counted = self.tensors["confusion"], target != IGNORED
        pairs = target[counted] * len(confusion) + output.argmax(1)[counted]
        confusion += pairs.bincount(minlength=confusion.numel()).view_as(confusion).cpu()

    def means(self, steps: int) -> dict[str, float]:
        confusion = self.tensors["confusion"]
        right, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        return {"accuracy": float(right.sum() / confusion.sum()), "miou": float((right / either).nanmean())}

    def load(self, sums: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {"confusion": tensors["confusion"]}


def _with_skipped(notes: str, faults: Sequence[str]) -> str:
    """Print which pictures were left out, and why; return notes that say how many."""
    text = f"Pictures left out because of faults: {len(faults)}."
    console = Console(stderr=True)
    for line in (text, *(printable(f"  {fault}") for fault in faults)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return f"{notes} {text}".strip()
