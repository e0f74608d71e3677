"""Adam's parts: the momentum that every method here shares, and the step of deterministic parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayeslayers.optim.averages import corrected_weight

ADAM_STATE = ("momentum", "second_moment")


def momentum_average(state: dict[str, Any], grad: Tensor, beta1: float, key: str = "momentum") -> Tensor:
    """Return the bias-corrected exponential average of gradients, kept in `state[key]`.

    With the weight (1 - beta1) / (1 - beta1^t) for the newest gradient the average needs no
    correction afterwards: it is that of Adam (Kingma & Ba 2015), written as a recursion.
    """
    if beta1 == 0:
        return grad
    if key not in state:
        state[key] = torch.zeros_like(grad)
    return state[key].lerp_(grad, corrected_weight(1 - beta1, state["step"]))


def adam_direction(state: dict[str, Any], grad: Tensor, group: dict[str, Any], prefix: str = "") -> Tensor:
    """Return m / (sqrt(v) + 1e-8), both averages corrected for their start, kept in the state under a prefix."""
    key = f"{prefix}second_moment"
    if key not in state:
        state[key] = torch.zeros_like(grad)
    second = state[key].lerp_(grad.square(), 1 - group["beta2"])
    scale = (second / (1 - group["beta2"] ** state["step"])).sqrt_().add_(1e-8)
    average = momentum_average(state, grad, group["beta1"], f"{prefix}momentum")
    return torch.div(average, scale, out=scale)


def adam_update(parameters: Iterable[nn.Parameter], group: dict[str, Any], state: dict[Any, Any]) -> None:
    """Train the deterministic parameters of one group by Adam (Kingma & Ba 2015), without weight decay."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        own = state[parameter]
        own["step"] = own.get("step", 0) + 1
        parameter.add_(adam_direction(own, parameter.grad, group), alpha=-group["lr"])
