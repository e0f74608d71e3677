"""Recurrent cells: one step of an LSTM, a GRU or an Elman network, which a network calls once for each step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bayeslayers.curvature import LINEAR
from bayeslayers.layers.base import BayesianLayer, Ops
from bayeslayers.layers.recurrence import STEPS
from bayeslayers.layers.scope import OUTSIDE, scope_for


class _BayesCell(BayesianLayer):
    """What makes a cell Bayesian: each of its two weights with its bias is a linear op."""

    rule = LINEAR

    @classmethod
    def ops(cls, layer: nn.Module) -> Ops:
        return {f"weight_{end}": (LINEAR, (f"weight_{end}", f"bias_{end}")) for end in ("ih", "hh")}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if scope_for(self) is OUTSIDE:
            return super().forward(input, hx)  # pyright: ignore[reportAttributeAccessIssue]
        cell: Any = self
        mode = "LSTM" if isinstance(self, nn.LSTMCell) else "GRU" if isinstance(self, nn.GRUCell) else _mode(cell)
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], cell.hidden_size)
            hx = (zeros, zeros) if mode == "LSTM" else zeros
        h, c = hx if mode == "LSTM" else (hx, None)
        h, c = STEPS[mode](self.run("weight_ih", input), self.run("weight_hh", h), h, c)
        return h if c is None else (h, c)


class BayesRNNCell(_BayesCell, nn.RNNCell):
    """`nn.RNNCell` with a Gaussian posterior."""


class BayesLSTMCell(_BayesCell, nn.LSTMCell):
    """`nn.LSTMCell` with a Gaussian posterior."""


class BayesGRUCell(_BayesCell, nn.GRUCell):
    """`nn.GRUCell` with a Gaussian posterior."""


def _mode(cell: nn.RNNCell) -> str:
    return f"RNN_{cell.nonlinearity.upper()}"
