"""A scope in which every random operation of torch draws from one generator and is recorded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

Note = Callable[[str, int], None]
_aten = torch.ops.aten


class Randomness(TorchDispatchMode):
    """A scope in which the operations of this thread draw from one generator.

    Recurrent layers, attention and functional dropout reduce to the same few operations, which torch
    itself marks as random.

    Args:
        generator: Source of the random numbers; torch's default one if None.
        note: Called for each random operation, with its name and how many numbers it drew.

    Raises:
        ValueError: Inside the scope, if an operation takes no generator and has no rule here.
    """

    def __init__(self, generator: torch.Generator | None, note: Note | None = None):
        super().__init__()
        self.generator, self.note = generator, note
        self._on_other_devices: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        given = _arguments(func, args, kwargs)
        if _is_off(given):
            return func(*args, **kwargs)
        result = func(*args, **kwargs) if self.generator is None else self._drawn(func, given)
        if self.note is not None:
            first = result[0] if isinstance(result, tuple | list) else result
            self.note(str(func), first.numel())
        return result

    def _drawn(self, func: OpOverload, given: dict[str, Any]) -> Any:
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        generator = self._generator(torch.device(given.get("device") or "cpu") if first is None else first.device)
        if (variant := _with_generator(func)) is not None:
            return variant(**given | {"generator": given.get("generator") or generator})
        if func not in _RULES:
            raise ValueError(f"method 'dropout' must have a rule for '{func}', which takes no generator.")
        return _RULES[func](func, given, generator)

    def _generator(self, device: torch.device) -> torch.Generator:
        """Return the generator; for any other device, one that it has seeded."""
        assert self.generator is not None
        if device.type == self.generator.device.type:
            return self.generator
        if device not in self._on_other_devices:
            self._on_other_devices[device] = torch.Generator(device).manual_seed(_seed(self.generator))
        return self._on_other_devices[device]


@functools.cache
def _is_random(func: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags and func not in _SEEDED


@functools.cache
def _with_generator(func: OpOverload) -> OpOverload | None:
    """Return the overload of the operation that takes a generator besides the same arguments, or None."""
    wanted = {argument.name for argument in func._schema.arguments} | {"generator"}
    packet = func.overloadpacket
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        if {argument.name for argument in overload._schema.arguments} == wanted:
            return overload
    return None


def _arguments(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by their names."""
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs


def _is_off(given: dict[str, Any]) -> bool:
    """Whether dropout is off in a call that supports it."""
    modes = given.get("train"), given.get("training")
    return False in modes or 0 in (given.get("dropout_p"), given.get("dropout"))


def _seed(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator))


def _dropout(func: OpOverload, given: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, p = given["input"], given["p"]
    kept = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * kept / (1 - p), kept.bool()


def _cudnn_rnn(func: OpOverload, given: dict[str, Any], generator: torch.Generator) -> Any:
    """Run cuDNN's recurrent layers with a dropout state that this generator seeds."""
    state = _aten._cudnn_init_dropout_state(
        given["dropout"], True, _seed(generator), dtype=torch.uint8, device=given["input"].device
    )
    return func(**given | {"dropout_state": state})


def _attention(func: OpOverload, given: dict[str, Any], generator: torch.Generator) -> tuple[Any, ...]:
    """Return the output of an attention, fused or not, with dropout of its weights by the generator."""
    query, key, value, p = given["query"], given["key"], given["value"], given["dropout_p"]
    if query.dim() > 3 and (groups := query.shape[-3] // key.shape[-3]) > 1:
        key, value = (part.repeat_interleave(groups, -3) for part in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"])
    bias = given.get("attn_bias", given.get("attn_mask"))
    if given["is_causal"]:
        bias = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    weights = _aten._safe_softmax(scores, -1)
    output = weights * torch.empty_like(weights).bernoulli_(1 - p, generator=generator) / (1 - p) @ value
    # The remaining outputs serve a backward pass.
    rest = (query.new_empty(0) if str(part.type) == "Tensor" else 0 for part in func._schema.returns[1:])
    return output, *rest


_SEEDED = (_aten._cudnn_init_dropout_state.default,)  # take their seed as an argument
_RULES: dict[OpOverload, Callable[[OpOverload, dict[str, Any], torch.Generator], Any]] = {
    _aten.native_dropout.default: _dropout,
    _aten._cudnn_rnn.default: _cudnn_rnn,
    _aten._scaled_dot_product_attention_math.default: _attention,
    _aten._scaled_dot_product_flash_attention.default: _attention,
    _aten._scaled_dot_product_efficient_attention.default: _attention,
    _aten._scaled_dot_product_cudnn_attention.default: _attention,
}
