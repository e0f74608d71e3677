"""The tasks by the names that configurations give them; a module is imported when its task is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.tasks.task import Task


def _classification() -> type[Task]:
    from recipes.tasks.classification import Classification

    return Classification


def _segmentation() -> type[Task]:
    from recipes.tasks.segmentation import Segmentation

    return Segmentation


def _continual() -> type[Task]:
    from recipes.tasks.continual import Continual

    return Continual


def _regression() -> type[Task]:
    from recipes.tasks.regression import Regression

    return Regression


def _text() -> type[Task]:
    from recipes.tasks.text import Text

    return Text


def _toy2d() -> type[Task]:
    from recipes.tasks.toy2d import ToyExperiment

    return ToyExperiment


TASKS: dict[str, Callable[[], type[Task]]] = {
    "classification": _classification,
    "regression": _regression,
    "segmentation": _segmentation,
    "continual": _continual,
    "text": _text,
    "toy2d": _toy2d,
}
DEFAULT = "classification"
