"""Whether dimension 0 of a layer's input runs over the examples: by provenance, for sizes agree by accident.

The examples of a batch are rolled by one, and the rows of each layer's input must roll likewise. That
holds whatever a network does to all examples alike, batch statistics included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayeslayers.sampling.sharing import evaluation_mode

Inputs = dict[str, list[Tensor]]


def refuse_other_rows(model: nn.Module, layers: Mapping[str, nn.Module], args: Any, kwargs: Any) -> bool:
    """Raise if the rows of a layer's input are not the examples of the model's; return whether that was tried.

    The model runs two times more, in eval mode and without gradients. Buffers, modes and torch's random
    numbers are as they were. A model that cannot be run so, or whose outputs are random in eval mode,
    passes, and so does a layer with another number of rows, which is found by it.

    Args:
        model: Model that is called as a whole.
        layers: Layers by name.
        args: Arguments of the call; the first tensor has the examples in dimension 0.
        kwargs: Likewise.

    Raises:
        RuntimeError: If a layer has other rows.
    """
    values, structure = tree_flatten((args, kwargs))
    first = next((v for v in values if isinstance(v, Tensor) and v.dim() > 0), None)
    if first is None or (examples := len(first)) < 2:
        return False
    batched = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim() > 0 and len(v) == examples]
    with _undisturbed(model):
        state = torch.get_rng_state()
        try:
            before = _inputs_of(model, layers, args, kwargs)
            wrong: list[str] = []
            for rolled in _choices(batched):
                torch.set_rng_state(state)
                moved = [v.roll(1, 0) if i in rolled else v for i, v in enumerate(values)]
                wrong = _unlike(before, _inputs_of(model, layers, *tree_unflatten(moved, structure)), examples)
                if not wrong:
                    return True
            random = _unlike(before, _inputs_of(model, layers, args, kwargs), examples, roll=0)
        except Exception:  # whatever a model raises outside its own mode
            return False
    if found := next((name for name in wrong if name not in random), None):
        raise RuntimeError(
            f"dimension 0 of the input of layer '{found}' must run over the examples, got {examples} rows there that "
            f"are not the {examples} examples: they do not move with them. Keep examples in dimension 0 (a linear "
            "layer takes (n, *, features)), use IVON, or exclude the layer from the Bayesian ones."
        )
    return True


def _choices(batched: list[int]) -> Iterator[set[int]]:
    """Yield the arguments to roll: all that may hold examples, then fewer, always with the first of them."""
    others = batched[1:4]
    for size in range(len(others), -1, -1):
        for chosen in itertools.combinations(others, size):
            yield {batched[0], *chosen, *(batched[4:] if size == len(others) else ())}


def _inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], args: Any, kwargs: Any) -> Inputs:
    """Run a model's forward, and return what each layer was called with."""
    found: Inputs = {name: [] for name in layers}

    def keep(name: str, inputs: Any, named: Any) -> None:
        tensors = [v for v in (*inputs, *named.values()) if isinstance(v, Tensor)]
        found[name].append(tensors[0].detach().clone())

    hooks = [
        layer.register_forward_pre_hook(lambda _, a, k, name=name: keep(name, a, k), with_kwargs=True)
        for name, layer in layers.items()
        if layer is not model
    ]
    try:
        model.forward(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _unlike(before: Inputs, after: Inputs, examples: int, roll: int = 1) -> list[str]:
    """Return the layers whose rows, where there are as many as examples, have not rolled with these."""
    return [
        name
        for name, inputs in before.items()
        for old, new in zip(inputs, after[name], strict=False)
        if old.dim() > 0 and len(old) == examples and not _close(new, old.roll(roll, 0))
    ]


def _close(new: Tensor, old: Tensor) -> bool:
    if new.shape != old.shape or not old.is_floating_point():
        return torch.equal(new, old)
    tolerance = torch.finfo(old.dtype).eps ** 0.5  # kernels round each row by its place
    return bool((new - old).abs().max() <= tolerance * old.abs().max())


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and without gradients, and put buffers and random numbers back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        torch.clear_autocast_cache()  # of weights that were cast without gradients
