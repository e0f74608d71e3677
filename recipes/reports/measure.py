"""A posterior measured on a data set, and OOD data told from it: the work of `bayeslayers evaluate`."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one
from recipes.data.names import by_short_name, short_name, without_folders
from recipes.data.split import Split, load_split
from recipes.training.devices import device_named

MISTAKES = 24  # the most confident ones, which a report shows


@dataclass
class EvaluationRequest:
    """What is measured.

    Attributes:
        posterior: A bundled name, a folder, or OWNER/REPO[@REVISION].
        data: Data set, as for `load_split`; None for the card's.
        ood: Out-of-distribution data sets.
        num_samples: Draws per batch.
        seed: Of the draws.
        method: How to predict, as in `bl.predict`; None for what the posterior's card says.
        limit: Use so many examples of each set alone.
        batch_size: Examples per forward pass.
    """

    posterior: str
    data: str | None = None
    ood: Sequence[str] = ()
    num_samples: int = 64
    seed: int = 0
    method: str | None = None
    limit: int | None = None
    batch_size: int = 250

    def command(self) -> str:
        """Return the command that asks this, without where things are on this machine."""
        words = ["bayeslayers", "evaluate", without_folders(self.posterior)]
        for option in dataclasses.fields(self)[1:]:
            value = getattr(self, option.name)
            for word in value if option.name == "ood" else [value] if value != option.default else []:
                words += [f"--{option.name.replace('_', '-')}", without_folders(str(word))]
        return shlex.join(words)


@dataclass(frozen=True)
class Mistake:
    """An example that is predicted wrongly: its image in bytes `(c, h, w)`, its class, the predicted one."""

    image: Tensor
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured.

    Attributes:
        request: What was asked, its data named.
        evaluation: The metrics.
        mistakes: The most confident mistakes, most confident first.
        versions: Of the libraries.
        command: What was typed.
        log: Rows of the training's log, where it has just been trained.
        epoch_request: What was asked after each epoch, for the log.
    """

    request: EvaluationRequest
    evaluation: bl.Evaluation
    mistakes: list[Mistake]
    versions: dict[str, str]
    command: str
    log: Sequence[Mapping[str, float]] = ()
    epoch_request: EvaluationRequest | None = None

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        asked = dataclasses.asdict(self.request) | {"ood": list(self.request.ood)}
        plain: dict[str, Any] = {"command": self.command, "versions": self.versions} | asked
        return json.dumps(plain | self.evaluation.to_dict(), indent=2, allow_nan=False) + "\n"


def evaluate(
    request: EvaluationRequest, data_root: str | Path | None = None, progress: bool = False, device: str | None = None
) -> EvaluationResult:
    """Measure a posterior of classes on the test split of a data set of images.

    Where the card and the data have the same names of classes in another order, labels go by name.

    Args:
        request: What is measured.
        data_root: Folder of data, as for `load_split`.
        progress: Whether to show a progress bar.
        device: Where to compute, as torch names it; None for the CPU.

    Raises:
        ValueError: If there is no such posterior, data or device, they do not fit, or a number is out of its range.
        OSError: If data or the Hub cannot be read.
    """
    for name in ("num_samples", "batch_size"):
        at_least_one(name, getattr(request, name))
    if request.limit is not None:
        at_least_one("limit", request.limit)
    where = device_named(device or "cpu")
    model = zoo.load(request.posterior).to(where)
    card = zoo.card_of(model)
    if card.likelihood != "categorical":
        raise ValueError(f"posterior must be one of classes, got a {card.likelihood} one.")
    if len(card.input_size) != 3:
        raise ValueError(f"posterior must take images, got one for inputs of shape {tuple(card.input_size)}.")
    request = dataclasses.replace(request, data=request.data or card.dataset.partition(" ")[0])
    if not request.data:
        raise ValueError("posterior's card must name its data set, got none. Give --data.")

    def load(name: str, argument: str) -> Split:
        split = load_split(name, data_root, train=False, size=card.input_size, resize=card.resize, argument=argument)
        return split.limited(request.limit)

    data = _aligned(load(request.data, "data"), card.class_names)
    ood = {name: load(full, "ood") for name, full in by_short_name(request.ood).items()}
    asked = request.command()
    name = card.name if Path(request.posterior).is_dir() else request.posterior
    request = dataclasses.replace(request, posterior=name, data=short_name(request.data), ood=list(ood))
    request = dataclasses.replace(request, method=request.method or card.method)
    return measure(model, request, data, ood, asked, progress)


def measure(
    model: nn.Module,
    request: EvaluationRequest,
    data: Split,
    ood: Mapping[str, Split],
    command: str,
    progress: bool = False,
) -> EvaluationResult:
    """Measure a network.

    Args:
        model: A network of classes.
        request: How it is measured.
        data: Examples, labelled by the network's classes.
        ood: Examples of other data, by name.
        command: What was typed.
        progress: Whether to show a progress bar.
    """
    evaluation = evaluate_network(model, request, data, ood, progress)
    return EvaluationResult(request, evaluation, _mistakes(model, data, evaluation, request), versions(), command)


def evaluate_network(
    model: nn.Module,
    request: EvaluationRequest,
    data: Split,
    ood: Mapping[str, Split] | None = None,
    progress: bool = False,
) -> bl.Evaluation:
    """Return the metrics that `measure` reports."""
    device, size = next(model.parameters()).device, request.batch_size
    return bl.evaluate(
        model,
        data.in_order(size, device),
        ood={name: split.in_order(size, device) for name, split in (ood or {}).items()},
        num_samples=request.num_samples,
        generator=torch.Generator(device).manual_seed(request.seed),
        progress=progress,
        **_method(request),
    )


def _method(request: EvaluationRequest) -> dict[str, Any]:
    """Return the argument that names the method, none where the request leaves it to the library."""
    return {} if request.method is None else {"method": request.method}


def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that every metric depends on, and of other packages."""
    found = {"bayeslayers": bl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in others}


def _aligned(data: Split, names: Sequence[str]) -> Split:
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


def _mistakes(model: nn.Module, data: Split, evaluation: bl.Evaluation, request: EvaluationRequest) -> list[Mistake]:
    """Return the mistakes that other draws of the weights make too, most confident first."""
    wrong = (~evaluation.scores["correct"].bool()).nonzero().flatten()
    index = wrong[evaluation.scores["confidence"][wrong].argsort(descending=True)][:MISTAKES]
    if len(index) == 0:
        return []
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(request.seed)
    inputs, images = data.inputs(index).to(device), data.images[index]
    prediction = bl.predict(model, inputs, request.num_samples, generator=generator, **_method(request))
    found = []
    for number, label in enumerate(data.labels[index].tolist()):
        predicted = int(prediction.labels[number])
        if predicted != label:
            true, guess = (data.classes[k] if k < len(data.classes) else str(k) for k in (label, predicted))
            found.append(Mistake(images[number], true, guess, float(prediction.confidence[number])))
    return sorted(found, key=lambda mistake: -mistake.confidence)
