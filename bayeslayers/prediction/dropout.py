"""The method "dropout" of `predict`: it samples dropout masks and keeps the weights at their means.

The network runs once in training mode, and `randomness` records which operations draw random numbers: modules,
functions called with `training=self.training`, the dropout of recurrent layers and of attention, and stochastic
depth. Only the modules that draw are then put in training mode.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from bayeslayers.inputs import Batch, call, device_of, on_rows, repeated
from bayeslayers.layers.base import POSTERIOR_SUFFIXES
from bayeslayers.outputs import Output, tensor_output
from bayeslayers.prediction.chunks import AtOnce, Plan, Run
from bayeslayers.prediction.randomness import Randomness


def dropout_draws(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Sample dropout masks with the weights at their means: Monte-Carlo dropout.

    Normalisation layers and all modules that draw nothing themselves stay in eval mode. The modes are set on
    a copy, which shares the model's tensors.
    Source: Gal & Ghahramani 2016 (arXiv 1506.02142).

    Raises:
        ValueError: If nothing in the network draws in training mode, if that mode fails, or if it changes
            more than dropout does.
    """
    network, folds = _copy(model, [*model.parameters(), *model.buffers()]), None
    at_once = AtOnce(network, plan)

    def forward(draws: slice, batch: Batch) -> Tensor:
        nonlocal folds
        if folds is None:
            folds = _switch_on(model, network, on_rows(lambda x: x[:1], batch), plan.output)
        number = draws.stop - draws.start
        with Randomness(plan.generator):
            if not folds:
                return torch.stack([tensor_output(call(network, batch), plan.output) for _ in range(number)])
            rows = repeated(batch, number) if number > 1 else batch
            return tensor_output(call(network, rows), plan.output).unflatten(0, (number, -1))

    for count in plan.counts(at_once):
        yield partial(at_once.outputs, forward, count)
        at_once.settle()


class _Draw(NamedTuple):
    """Random numbers of a network: the operation that drew them, how many, and its modules, the innermost last."""

    operation: str
    count: int
    path: tuple[str, ...]


def _switch_on(model: nn.Module, network: nn.Module, example: Batch, part: Output | None) -> bool:
    """Put the modules with dropout in training mode, and return whether samples may be folded into the batch.

    Args:
        model: The network, in eval mode.
        network: Its copy, whose modes are set.
        example: A batch of one example.
        part: Which part of what the network returns is predicted.
    """
    two, four = (repeated(example, rows) for rows in (2, 4))
    expected = tensor_output(call(model, two), part).shape
    drawn = _drawn_in_training(model, two)
    names = {name: module for name, module in model.named_modules() if not isinstance(module, _NormBase)}
    on = {draw.path[-1] for draw in drawn}
    on |= {name for name, module in names.items() if isinstance(module, _DropoutNd) and module.p > 0}
    if not on:
        raise ValueError(
            "model must have nn.Dropout modules for method 'dropout', got none with p > 0, nor any other operation "
            "that is random in training mode: all samples would be equal."
        )
    trial = _copy(model, _posterior_tensors(model))
    while True:
        _set_training(trial, on)
        found, output = _run(trial, two)
        missing = Counter(draw[:2] for draw in drawn) - Counter(draw[:2] for draw in found)
        if not missing or on == names.keys():
            break
        on |= _enclosing([draw for draw in drawn if draw[:2] in missing], on) or names.keys()
    _check_changes(model, trial, _shape(output, part), tuple(expected))
    _set_training(network, on)
    return [(draw.operation, 2 * draw.count) for draw in found] == [draw[:2] for draw in _run(trial, four)[0]]


def _drawn_in_training(model: nn.Module, x: Batch) -> list[_Draw]:
    """Return what a network draws in training mode, with its normalisation layers in eval mode."""
    trial, path = _copy(model, _posterior_tensors(model)), []
    _set_training(trial, (name for name, module in trial.named_modules() if not isinstance(module, _NormBase)))
    for name, module in trial.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: path.append(name))
        module.register_forward_hook(lambda *_: (path.pop(), None)[1], always_call=True)
    try:
        return _run(trial, x, path)[0]
    except Exception as error:
        raise ValueError(
            "the model must run in training mode, where method 'dropout' finds what it drops, but failed there: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _run(network: nn.Module, x: Batch, path: Iterable[str] = ()) -> tuple[list[_Draw], object]:
    """Run a network once, with a generator of its own, and return what it drew and its output."""
    draws: list[_Draw] = []
    generator = torch.Generator(device_of(x)).manual_seed(0)
    with Randomness(generator, lambda operation, count: draws.append(_Draw(operation, count, tuple(path)))):
        return draws, call(network, x)


def _enclosing(draws: Iterable[_Draw], on: set[str]) -> set[str]:
    """Return, for each draw, the innermost enclosing module that is not in training mode, which suppresses it."""
    nearest = (next((name for name in reversed(draw.path) if name not in on), None) for draw in draws)
    return {name for name in nearest if name is not None}


def _shape(output: object, part: Output | None) -> object:
    """Return the shape of the output that is predicted, the name of a type where there is none."""
    try:
        return tuple(tensor_output(output, part).shape)
    except (TypeError, ValueError):
        return type(output).__name__


def _check_changes(model: nn.Module, trial: nn.Module, shape: object, expected: object) -> None:
    """Raise if the modules do more than dropout in training mode."""
    if shape != expected:
        raise ValueError(
            f"method 'dropout' must not change what the model returns, got {shape} instead of {expected} with "
            "the modules that drop something in training mode. Move dropout to modules of its own."
        )
    before = dict(model.named_buffers())
    for name, buffer in trial.named_buffers():
        if buffer is not before[name] and not torch.equal(buffer, before[name]):
            raise ValueError(
                f"method 'dropout' must leave buffer '{name}' unchanged, got another value with the modules that drop "
                "something in training mode. Move dropout to modules of its own."
            )


def _posterior_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that no forward pass changes: parameters, and the buffers of posteriors."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(POSTERIOR_SUFFIXES)]
    return [*model.parameters(), *buffers]


def _copy(model: nn.Module, shared: Iterable[Tensor]) -> nn.Module:
    """Return a copy of the modules that shares the given tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _set_training(network: nn.Module, on: Iterable[str]) -> None:
    names = set(on)
    for name, module in network.named_modules():
        module.training = name in names
