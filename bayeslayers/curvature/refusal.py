"""The refusal of a layer or parameter whose per-example gradients cannot be told apart as the model uses it."""

from __future__ import annotations

from typing import NamedTuple


class Origin(NamedTuple):
    """What a tensor comes from, for messages.

    Attributes:
        kind: Such as "parameter" or "the output of layer".
        name: Of the parameter or layer.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"


class CurvatureRefusal(RuntimeError):
    """A layer or a parameter has no exact per-example curvature in the use that the model makes of it.

    Args:
        name: Of the layer or the parameter.
        reason: What is wrong, and what to do.

    Attributes:
        name: As given.
        reason: As given.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.reason} to_bayesian(model, example_inputs=batch) reports all such layers at once."
