"""Where the examples are in a layer's input: by provenance, for sizes agree by accident.

The examples of a batch are rolled by one, and what rolls likewise in a layer's input are the examples. That holds
whatever a network does to all examples alike, batch statistics included.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayeslayers.curvature.layout import CONSTANT, Layout, find_layout, is_close
from bayeslayers.curvature.refusal import CurvatureRefusal
from bayeslayers.curvature.watch import Note, Observed, Watch, copied
from bayeslayers.layers.scope import current, opened
from bayeslayers.sampling.sharing import evaluation_mode

Inputs = dict[str, list[Observed]]
Layouts = dict[str, list[Layout | None]]


def examples_of(args: Any, kwargs: Any) -> int:
    """Return how many examples a call of the model has: the size of dimension 0 of its first tensor, 0 without one.

    Args:
        args: Arguments of the call.
        kwargs: Likewise.
    """
    values, _ = tree_flatten((args, kwargs))
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim() > 0), 0)


def find_layouts(model: nn.Module, watch: Watch, args: Any, kwargs: Any) -> bool:
    """Find where the examples are in the inputs of each layer, in each of its uses; return whether that was tried.

    The model runs two times more, in eval mode and without gradients. Buffers, modes and torch's random
    numbers are as they were. A model that cannot be run so, or whose outputs are random in eval mode,
    passes, and so does a layer with another number of rows, which is found by it.

    Args:
        model: Model that is called as a whole, in a scope in which its layers are tracked.
        watch: State of the tracker, which gets the layouts.
        args: Arguments of the call; the first tensor has the examples in dimension 0.
        kwargs: Likewise.

    Raises:
        CurvatureRefusal: If a layer has as many rows as there are examples, and they are others.
    """
    examples = examples_of(args, kwargs)
    if examples < 2:
        return False
    values, structure = tree_flatten((args, kwargs))
    batched = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim() > 0 and len(v) == examples]
    with _undisturbed(model):
        state = torch.get_rng_state()
        watch.layouts, watch.examples, watch.meetings.layouts, watch.meetings.observed = {}, examples, [], []
        try:
            before = _inputs_of(model, watch, args, kwargs)
            tried: list[Layouts] = []
            for rolled in _choices(batched):
                torch.set_rng_state(state)
                moved = [v.roll(1, 0) if i in rolled else v for i, v in enumerate(values)]
                args_moved, kwargs_moved = tree_unflatten(moved, structure)
                found = _inputs_of(model, watch, args_moved, kwargs_moved, _comparing(before, examples))
                tried.append({name: _as_many(found.get(name, []), len(uses)) for name, uses in before.items()})
                if _unknown(tried[-1]) == 0:
                    break
            layouts = min(tried, key=_unknown)
            if watch.reads or any(CONSTANT in found for found in layouts.values()):
                torch.set_rng_state(state)
                rolled = next(r for r, each in zip(_choices(batched), tried, strict=False) if each is layouts)
                moved = [v.roll(1, 0) if i in rolled else v for i, v in enumerate(values)]
                _find_meetings(model, watch, layouts, examples, [(args, kwargs), tree_unflatten(moved, structure)])
            suspects = _suspects(before, layouts, examples)
            again = _inputs_of(model, watch, args, kwargs, _repeating(before)) if suspects else {}
        except Exception:  # whatever a model raises outside its own mode
            return False
        finally:
            watch.examples, watch.meetings.observed = None, None
    for name, i in suspects:
        if again[name][i]:  # else the network is random
            raise CurvatureRefusal(
                name,
                f"dimension 0 of the input of layer '{name}' must run over the examples, got {examples} rows there "
                f"that are not the {examples} examples: they do not move with them. Keep examples in dimension 0 (a "
                "linear layer takes (n, *, features)), use IVON, or exclude the layer from the Bayesian ones.",
            )
    watch.layouts = layouts
    watch.looked = {name: [use.input.shape for use in uses] for name, uses in before.items()}
    return True


def _find_meetings(model: nn.Module, watch: Watch, layouts: Layouts, examples: int, runs: Sequence[Any]) -> None:
    """Find where the examples are wherever an output that does not depend on the batch meets what does.

    A result that depends on the batch neither is followed further, in two more runs.

    Args:
        model: The model.
        watch: State of the tracker, which gets the layouts.
        layouts: Where the examples are in the layers' inputs.
        examples: How many there are.
        runs: Arguments of the two runs: as they are, and rolled.
    """
    meetings, state = watch.meetings, torch.get_rng_state()
    watch.layouts, meetings.layouts = layouts, []
    try:
        while True:
            seen = []
            for args, kwargs in runs:
                torch.set_rng_state(state)
                meetings.index, meetings.observed = 0, []
                _inputs_of(model, watch, args, kwargs)
                seen.append(meetings.observed)
            found = list(meetings.layouts)
            results = list(zip(*seen, strict=True))
            known = sum(layout != CONSTANT for _, layout in found)
            for (op, old), (_, new) in results[known:]:
                constant = torch.equal(old, new)
                found.append((op, CONSTANT if constant else find_layout(old, new, examples, range(old.dim()))))
                if constant:  # behind it there are further meetings
                    break
            else:
                meetings.layouts = found
                return
            meetings.layouts = found
    finally:
        watch.layouts, meetings.observed = {}, []


def storages_of(model: nn.Module) -> frozenset[int]:
    """Return the storages of a model's parameters and buffers, by which tensors are known that no example enters.

    Args:
        model: The model.
    """
    return frozenset(x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers()))


def _suspects(before: Inputs, layouts: Layouts, examples: int) -> list[tuple[str, int]]:
    """Return the uses whose rows are as many as the examples, and others."""
    return [
        (name, i)
        for name, found in layouts.items()
        for i, (use, layout) in enumerate(zip(before[name], found, strict=True))
        if layout is None and use.input.shape[:1] == (examples,)
    ]


def _unknown(layouts: Layouts) -> int:
    """Return in how many uses the examples were not found."""
    return sum(found.count(None) for found in layouts.values())


def _as_many(found: list[Layout | None], uses: int) -> list[Layout | None]:
    """Return what was found of a layer's uses, nothing if they were not as many as before."""
    return found if len(found) == uses else [None] * uses


def _comparing(before: Inputs, examples: int) -> Note:
    """Return what notes where the examples are in an input, by comparison with that of the first run.

    Each comparison is made as the input comes: a copy of all inputs would take as much memory as the graph of a step.
    """

    def note(name: str, index: int, x: Tensor, dims: tuple[int, ...]) -> Layout | None:
        uses = before.get(name, [])
        return find_layout(uses[index].input, x, examples, uses[index].dims) if index < len(uses) else None

    return note


def _repeating(before: Inputs) -> Note:
    """Return what notes whether an input is that of the first run."""

    def note(name: str, index: int, x: Tensor, dims: tuple[int, ...]) -> bool:
        uses = before.get(name, [])
        return index < len(uses) and is_close(uses[index].input, x)

    return note


def _choices(batched: list[int]) -> Iterator[set[int]]:
    """Yield the arguments to roll: all that may hold examples, then fewer, always with the first of them."""
    others = batched[1:4]
    for size in range(len(others), -1, -1):
        for chosen in itertools.combinations(others, size):
            yield {batched[0], *chosen, *(batched[4:] if size == len(others) else ())}


def _inputs_of(model: nn.Module, watch: Watch, args: Any, kwargs: Any, note: Note = copied) -> dict[str, list[Any]]:
    """Run a model's forward, and return what is noted of the calls of its layers' ops: copies, or something else."""
    watch.observed, watch.note = (found := {}), note
    try:
        with opened(replace(current(), observes=True)), torch.compiler.set_stance("force_eager"):
            model.forward(*args, **kwargs)
    finally:
        watch.observed, watch.note = None, copied
    return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and without gradients, and put buffers and random numbers back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the call itself gives them
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        torch.clear_autocast_cache()  # of weights that were cast without gradients
