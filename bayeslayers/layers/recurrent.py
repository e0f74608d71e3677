"""Recurrent layers: LSTM, GRU and Elman networks over sequences, with any number of layers and directions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

from bayeslayers.curvature import LINEAR
from bayeslayers.curvature.lifted import Lifted
from bayeslayers.dtypes import at_least_float32, full_precision
from bayeslayers.layers.base import BayesianLayer, Ops
from bayeslayers.layers.recurrence import recurrence, states_of


class _BayesRNN(BayesianLayer):
    """What makes a recurrent layer Bayesian: each weight with its bias is a linear op, whose positions are the steps.

    While curvature is tracked, the layer computes by `recurrence`, and by plain steps where `torch.func` transforms it;
    else by torch's own kernel, with the weights of the scope.
    """

    rule = LINEAR

    @classmethod
    def ops(cls, layer: Any) -> Ops:
        found: dict[str, Any] = {}
        for end in _endings(layer):
            found[f"weight_ih{end}"] = LINEAR, (f"weight_ih{end}", f"bias_ih{end}")
            found[f"weight_hh{end}"] = LINEAR, (f"weight_hh{end}", f"bias_hh{end}")
            if layer.proj_size:
                found[f"weight_hr{end}"] = LINEAR, (f"weight_hr{end}", "")
        return found

    def _values(self: Any) -> list[Any]:
        return [self.value(name) for name in self._flat_weights_names]

    def _forget(self, values: object) -> None:
        """Keep no list: it is made of the scope's values when torch reads it."""

    _flat_weights = property(_values, _forget)

    def _weights_have_changed(self) -> bool:
        return False

    def forward(self, input: Any, hx: Any = None) -> Any:
        layer: Any = self
        if self.tracking is None and (torch.compiler.is_compiling() or peek_interpreter_stack() is None):
            return super().forward(input, hx)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        layer.check_input(input.unsqueeze(1) if input.dim() == 2 else input, None)
        if input.dim() == 2:  # a single example
            state = None if hx is None else tree_map(lambda each: each.unsqueeze(1), hx)
            output, state = self._run(input.unsqueeze(1), state, None)
            return output.squeeze(1), tree_map(lambda each: each.squeeze(1), state)
        output, state = self._run(input.transpose(0, 1) if layer.batch_first else input, hx, None)
        return output.transpose(0, 1) if layer.batch_first else output, state

    def _run_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        layer: Any = self
        layer.check_input(input.data, input.batch_sizes)
        x, lengths = pad_packed_sequence(input)
        output, state = self._run(x, hx, lengths.to(x.device))
        if (order := input.sorted_indices) is not None:
            output, lengths = output[:, order], lengths[order.to(lengths.device)]
        packed = pack_padded_sequence(output, lengths)
        return input._replace(data=packed.data), state

    def _run(self, x: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """Return output and last state for sequences `(t, n, features)`, all of the same length or padded behind it."""
        layer: Any = self
        h, c = self._first_state(x, hx)
        directions = 2 if layer.bidirectional else 1
        ends, last = _endings(layer), []
        for index in range(0, len(ends), directions):
            outputs = []
            for place in range(index, index + directions):
                turned = place > index
                own = h[place], None if c is None else c[place]
                states = self._sequence(ends[place], _reversed(x, lengths) if turned else x, *own)
                last.append([_last(each, lengths) for each in states if each is not None])
                outputs.append(_reversed(states[0], lengths) if turned else states[0])
            x = torch.cat(outputs, -1)
            if index + directions < len(ends):
                x = F.dropout(x, layer.dropout, layer.training)
        state = tuple([torch.stack(column) for column in zip(*last, strict=True)])
        return x, state[0] if c is None else state

    def _first_state(self, x: Tensor, hx: Any) -> tuple[Tensor, Tensor | None]:
        layer: Any = self
        is_lstm, count = layer.mode == "LSTM", len(_endings(layer))
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + is_lstm]
        shapes = [(count, x.shape[1], size) for size in sizes]
        given = [x.new_zeros(shape) for shape in shapes] if hx is None else list(hx) if is_lstm else [hx]
        for each, shape in zip(given, shapes, strict=True):
            layer.check_hidden_size(each, shape)
        return given[0], given[1] if is_lstm else None

    def _sequence(self, end: str, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the states of one layer in one direction after each step, and an LSTM's cell states."""
        layer: Any = self
        a = self._positions(f"weight_ih{end}", x)
        if isinstance(a, Lifted):
            raise RuntimeError(
                f"the input of a {type(self).__name__} must depend on the batch, got one that does not. Exclude the "
                "layer from the Bayesian ones, or use IVON."
            )
        with full_precision(x.device.type):
            names = (f"weight_hh{end}", f"bias_hh{end}", f"weight_hr{end}")
            tensors = [self.value(name) if name in self._parameters else None for name in names]
            wide: Any = [None if each is None else at_least_float32(each) for each in (*tensors, a, h, c)]
            weight, bias, projection, a, h, c = wide
            if self.tracking is None:
                states = states_of(layer.mode, a, weight, bias, h, c, projection)
                found = states.hidden, states.cells
            else:
                with torch.no_grad():
                    states = states_of(layer.mode, a, weight, bias, h, c, projection)
                before = torch.cat([h.detach()[None], states.hidden[:-1]])
                p = at_least_float32(self._positions(f"weight_hh{end}", before))
                r = None if states.inner is None else self._positions(f"weight_hr{end}", states.inner)
                found = recurrence(layer.mode, a, p, r, h, c, weight, projection, states)
        return found[0].to(x.dtype), None if found[1] is None else found[1].to(x.dtype)

    def _positions(self, op: str, x: Tensor) -> Tensor:
        """Return a linear op of all steps at once, `(t, n, *)`."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.value(op).dtype)  # states are in at least float32
        return self.run(op, x.transpose(0, 1)).transpose(0, 1)


class BayesRNN(_BayesRNN, nn.RNN):
    """`nn.RNN` with a Gaussian posterior; takes what that takes, packed sequences too."""


class BayesLSTM(_BayesRNN, nn.LSTM):
    """`nn.LSTM` with a Gaussian posterior; takes what that takes, packed sequences too."""


class BayesGRU(_BayesRNN, nn.GRU):
    """`nn.GRU` with a Gaussian posterior; takes what that takes, packed sequences too."""


def _endings(layer: Any) -> list[str]:
    """Return what the names of a layer's tensors end in, for each layer and direction."""
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"_l{index}{direction}" for index in range(layer.num_layers) for direction in directions]


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return sequences `(t, n, *)` back to front; padding stays behind them."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device)[:, None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, index[..., None].expand_as(x))


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return what sequences `(t, n, features)` end in."""
    if lengths is None:
        return x[-1]
    return x.gather(0, (lengths - 1)[None, :, None].expand(1, *x.shape[1:]))[0]
