"""A posterior measured on a data set, and OOD data told from it: the work of `bayeslayers evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import bayeslayers as bl
import zoo
from recipes.data.names import short_name
from recipes.data.split import NAMES
from recipes.reports.measure import EvaluationRequest, EvaluationResult, check_request, measure
from recipes.tasks.posterior_task import PosteriorTask
from recipes.tasks.table import TASKS
from recipes.training.devices import device_named


def evaluate(
    request: EvaluationRequest, data_root: str | Path | None = None, progress: bool = False, device: str | None = None
) -> EvaluationResult:
    """Measure a posterior on the test split of a data set, as the task does that its card fits.

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
    check_request(request)
    where = device_named(device or "cpu")
    model = zoo.load(request.posterior).to(where)
    card = zoo.card_of(model)
    task = task_of(card)
    of_card = request.data in (None, "card")
    request = dataclasses.replace(request, data=card.dataset.partition(" ")[0] if of_card else request.data)
    if not request.data:
        raise ValueError("posterior's card must name its data set, got none. Give --data.")
    try:
        data, ood = task.read_test_splits(card, request, data_root)
    except ValueError as error:
        if not of_card or request.data in NAMES:
            raise
        raise ValueError(
            f"{error} The card names the data {request.data!r} without its place: give it by --data, as in training."
        ) from None
    command, name = request.command(), card.name if Path(request.posterior).is_dir() else request.posterior
    request = dataclasses.replace(request, posterior=name, data=short_name(request.data), ood=list(ood))
    request = dataclasses.replace(request, method=request.method or card.method)
    request = dataclasses.replace(request, batch_size=task.batch_size(request.batch_size))
    result = measure(task.as_measured(model), request, data, ood, command, progress)
    return dataclasses.replace(result, sections=task.sections(model, request, data, result.evaluation))


def task_of(card: bl.Card) -> type[PosteriorTask]:
    """Return the first task of the table that measures posteriors of such a card.

    Raises:
        ValueError: If none does, with the reason of the first.
    """
    tasks = [task for make in TASKS.values() if issubclass(task := make(), PosteriorTask)]
    refusals = [task.refusal(card) for task in tasks]
    if "" not in refusals:
        raise ValueError(refusals[0])
    return tasks[refusals.index("")]
