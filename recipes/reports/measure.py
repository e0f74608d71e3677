"""A network measured on data, and OOD data told from it: what is asked, and what comes of it."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one
from bayeslayers.corruptions import KINDS, check_kinds
from bayeslayers.distributed import is_distributed
from recipes.data.examples import Examples, InOrder
from recipes.data.names import without_folders
from recipes.training.launch import stoppable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class EvaluationRequest:
    """What is measured.

    Attributes:
        posterior: A bundled name, a folder, or OWNER/REPO[@REVISION].
        data: Data set, as for `load_split`; None or "card" for the card's.
        ood: Out-of-distribution data sets.
        num_samples: Draws per batch.
        seed: Of the draws.
        method: How to predict, as in `bl.predict`; None for what the posterior's card says.
        limit: Use only so many examples of each set.
        batch_size: Examples per forward pass.
        corruptions: Kinds of corruption that images are also measured with, as `bl.corrupt` names them.
    """

    posterior: str
    data: str | None = None
    ood: Sequence[str] = ()
    num_samples: int = 64
    seed: int = 0
    method: str | None = None
    limit: int | None = None
    batch_size: int = 250
    corruptions: Sequence[str] = ()

    def command(self) -> str:
        """Return the command that asks this, without where things are on this machine."""
        words = ["bayeslayers", "evaluate", without_folders(self.posterior)]
        for option in dataclasses.fields(self)[1:-1]:
            value = getattr(self, option.name)
            for word in value if option.name == "ood" else [value] if value != option.default else []:
                words += [f"--{option.name.replace('_', '-')}", without_folders(str(word))]
        if self.corruptions:
            words += ["--corruptions", *([] if set(self.corruptions) == set(KINDS) else [",".join(self.corruptions)])]
        return shlex.join(words)


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        image: A figure, or bytes `(c, h, w)`.
        name: What it is, for whoever does not see it.
        caption: Lines of text, each of parts, every second one of which is emphasised.
    """

    image: Figure | Tensor
    name: str
    caption: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Section:
    """A section of a report that a task adds.

    Attributes:
        title: Its heading.
        text: A paragraph below it.
        pictures: What it shows.
        layout: "small" for thumbnails, "wide" for pictures as wide as the page, "pair" for two in a row.
    """

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    layout: Literal["small", "wide", "pair"] = "pair"


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured.

    Attributes:
        request: What was asked, its data named.
        evaluation: The metrics.
        sections: What its report shows beside the metrics.
        versions: Of the libraries.
        command: What was typed.
        log: Rows of the training's log, where it has just been trained.
        epoch_request: What was asked after each epoch, for the log.
    """

    request: EvaluationRequest
    evaluation: bl.Evaluation
    sections: Sequence[Section]
    versions: dict[str, str]
    command: str
    log: Sequence[Mapping[str, float]] = ()
    epoch_request: EvaluationRequest | None = None

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        asked = dataclasses.asdict(self.request) | {"ood": list(self.request.ood)}
        del asked["corruptions"]  # their metrics name them
        plain: dict[str, Any] = {"command": self.command, "versions": self.versions} | asked
        return json.dumps(plain | self.evaluation.to_dict(), indent=2, allow_nan=False) + "\n"


def check_request(request: EvaluationRequest) -> None:
    """Refuse a count below 1, and an unknown kind of corruption."""
    for name in ("num_samples", "batch_size"):
        at_least_one(name, getattr(request, name))
    if request.limit is not None:
        at_least_one("limit", request.limit)
    if request.corruptions:
        check_kinds("corruptions", request.corruptions)


def measure(
    model: nn.Module,
    request: EvaluationRequest,
    data: Examples,
    ood: Mapping[str, Examples],
    command: str,
    progress: bool = False,
) -> EvaluationResult:
    """Measure a network.

    Args:
        model: The network.
        request: How it is measured.
        data: Examples, with targets as its likelihood takes them.
        ood: Examples of other data, by name.
        command: What was typed.
        progress: Whether to show a progress bar.
    """
    evaluation = evaluate_network(model, request, data, ood, progress)
    return EvaluationResult(request, evaluation, (), versions(), command)


def evaluate_network(
    model: nn.Module,
    request: EvaluationRequest,
    data: Examples,
    ood: Mapping[str, Examples] | None = None,
    progress: bool = False,
) -> bl.Evaluation:
    """Return the metrics that `measure` reports."""
    device, size = next(model.parameters()).device, request.batch_size
    shared = is_distributed()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)

    def batches(examples: Examples) -> Any:
        found = InOrder(examples, size, device, rank, ranks)
        return stoppable(found) if shared else found

    return bl.evaluate(
        model,
        batches(data),
        ood={name: batches(examples) for name, examples in (ood or {}).items()},
        corruptions=list(request.corruptions) or False,
        num_samples=request.num_samples,
        generator=torch.Generator(device).manual_seed(request.seed),
        progress=progress,
        sync=shared,
        **method_options(request),
    )


def method_options(request: EvaluationRequest) -> dict[str, Any]:
    """Return the argument that names the method, none where the request leaves it to the library."""
    return {} if request.method is None else {"method": request.method}


def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python, of the libraries that every metric depends on, and of other packages."""
    found = {"bayeslayers": bl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in others}
