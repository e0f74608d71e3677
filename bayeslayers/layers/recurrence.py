"""Recurrence in time with the two linear maps of each step as ops of their own, so that their curvature rules apply.

A step of a recurrent layer is a function of a = W_ih x + b_ih and p = W_hh h + b_hh. The gradient of an example with
respect to W_hh is the sum over time of the outer products of p's gradient and h: a linear layer's, with the steps as
positions. torch's fused kernels return neither gradient. Here the states are computed first, without gradients; then p
is one linear op on all of them at once, and `recurrence` passes the gradients of the states back to a and p.

Sequences are `(t, n, *)` in this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]


class States(NamedTuple):
    """What a layer goes through in time.

    Attributes:
        hidden: States after each step, `(t, n, h)`; projected ones where the layer has a projection.
        cells: Likewise the cell states of an LSTM, None for others.
        inner: The states before the projection, None without one.
    """

    hidden: Tensor
    cells: Tensor | None
    inner: Tensor | None


def _rnn_tanh(a: Tensor, p: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    return (a + p).tanh(), None


def _rnn_relu(a: Tensor, p: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    return (a + p).relu(), None


def _lstm(a: Tensor, p: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (a + p).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(a: Tensor, p: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    (a_r, a_z, a_n), (p_r, p_z, p_n) = a.chunk(3, -1), p.chunk(3, -1)
    n = torch.addcmul(a_n, (a_r + p_r).sigmoid(), p_n).tanh()
    return torch.lerp(n, h, (a_z + p_z).sigmoid()), None


STEPS: dict[str, Step] = {"RNN_TANH": _rnn_tanh, "RNN_RELU": _rnn_relu, "LSTM": _lstm, "GRU": _gru}


def states_of(
    mode: str, a: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, c: Tensor | None, projection: Tensor | None
) -> States:
    """Return the states of a layer, step by step.

    Args:
        mode: Kind of the layer, a key of `STEPS`.
        a: What the inputs give, W_ih x + b_ih, `(t, n, gates)`.
        weight: W_hh.
        bias: b_hh, None for none.
        h: State before the first step, `(n, h)`.
        c: Cell state there, for an LSTM.
        projection: W_hr of an LSTM with one.
    """
    step, hidden, cells, inner = STEPS[mode], [], [], []
    for a_t in a.unbind(0):
        h, c = step(a_t, F.linear(h, weight, bias), h, c)
        if projection is not None:
            inner.append(h)
            h = F.linear(h, projection)
        hidden.append(h)
        cells.append(c)
    return States(
        torch.stack(hidden),
        None if c is None else torch.stack(cells),
        torch.stack(inner) if inner else None,
    )


def recurrence(
    mode: str,
    a: Tensor,
    p: Tensor,
    r: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    weight: Tensor,
    projection: Tensor | None,
    states: States,
) -> tuple[Tensor, Tensor | None]:
    """Return hidden and cell states of a layer, from which gradients reach a, p, r and the first states.

    Args:
        mode: Kind of the layer, a key of `STEPS`.
        a: What the inputs give, W_ih x + b_ih, `(t, n, gates)`.
        p: What the states before each step give, W_hh h + b_hh, `(t, n, gates)`.
        r: W_hr applied to the inner states, for an LSTM with a projection.
        h: State before the first step, `(n, h)`.
        c: Cell state there, for an LSTM.
        weight: W_hh, which gets its gradient by p.
        projection: W_hr, likewise by r.
        states: As `states_of` returns them.
    """
    fixed = [None if x is None else x.detach() for x in (weight, projection, states.hidden, states.cells)]
    return _Recurrence.apply(mode, a, p, r, h, c, *fixed)


class _Recurrence(torch.autograd.Function):
    """States that are known already, with their derivatives by what they were computed from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mode, a, p, r, h, c, weight, projection, hidden, cells):
        return hidden.clone(), None if cells is None else cells.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mode, a, p, _, h, c, weight, projection, hidden, cells = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, p, h, c, weight, projection, hidden, cells)

    @staticmethod
    def backward(ctx, g_hidden, g_cells):
        if g_hidden is None and g_cells is None:
            return (None,) * 10
        a, p, h, c, weight, projection, hidden, cells = ctx.saved_tensors
        g_hidden = torch.zeros_like(hidden) if g_hidden is None else g_hidden
        before = torch.cat([h[None], hidden[:-1]])
        if ctx.mode == "LSTM":
            cells_before = torch.cat([c[None], cells[:-1]])
            found = _lstm_backward(a + p, cells_before, cells, weight, projection, g_hidden, g_cells)
        elif ctx.mode == "GRU":
            found = _gru_backward(a, p, before, weight, g_hidden)
        else:
            found = _rnn_backward(hidden, weight, g_hidden, relu=ctx.mode == "RNN_RELU")
        return (None, *found, None, None, None, None)


def _rnn_backward(hidden: Tensor, weight: Tensor, g: Tensor, relu: bool) -> tuple[Tensor | None, ...]:
    slope = (hidden > 0).to(g.dtype) if relu else 1 - hidden.square()
    carried, grads = torch.zeros_like(g[0]), []
    for g_t, slope_t in zip(reversed(g.unbind(0)), reversed(slope.unbind(0)), strict=True):
        grads.append((g_t + carried) * slope_t)
        carried = grads[-1] @ weight
    of_p = torch.stack(grads[::-1])
    return of_p, of_p, None, carried, None


def _gru_backward(a: Tensor, p: Tensor, before: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    (a_r, a_z, a_n), (p_r, p_z, p_n) = a.chunk(3, -1), p.chunk(3, -1)
    r, z = (a_r + p_r).sigmoid(), (a_z + p_z).sigmoid()
    n = torch.addcmul(a_n, r, p_n).tanh()
    of_n = (1 - z) * (1 - n.square())
    of_gates = torch.stack([of_n * p_n * r * (1 - r), (before - n) * z * (1 - z), of_n], -2)  # (t, n, 3, h), times g
    through_p = of_gates * torch.stack([torch.ones_like(r), torch.ones_like(r), r], -2)
    carried, total = torch.zeros_like(g[0]), []
    for g_t, z_t, through_t in zip(*[reversed(x.unbind(0)) for x in (g, z, through_p)], strict=True):
        total.append(g_t + carried)
        carried = total[-1] * z_t + (total[-1].unsqueeze(-2) * through_t).flatten(-2) @ weight
    of_hidden = torch.stack(total[::-1]).unsqueeze(-2)
    return (of_hidden * of_gates).flatten(-2), (of_hidden * through_p).flatten(-2), None, carried, None


def _lstm_backward(
    gates: Tensor,
    cells_before: Tensor,
    cells: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    g: Tensor,
    g_cells: Tensor | None,
) -> tuple[Tensor | None, ...]:
    i, f, _, o = gates.sigmoid().chunk(4, -1)
    c, squashed = gates.chunk(4, -1)[2].tanh(), cells.tanh()
    by_inner = o - o * squashed.square()  # of the cell state; the gates' are of the cell state, but the last one's
    of_gates = torch.stack(
        [c * (i - i * i), cells_before * (f - f * f), i - i * c.square(), squashed * (o - o * o)], -2
    )  # (t, n, 4, h)
    carried, carried_cell, total = torch.zeros_like(g[0]), torch.zeros_like(cells[0]), []
    extra = [None] * len(g) if g_cells is None else g_cells.unbind(0)
    columns = [reversed(x.unbind(0)) for x in (g, f, by_inner, of_gates)]
    for g_t, f_t, by_inner_t, of_gates_t, extra_t in zip(*columns, reversed(extra), strict=True):
        total.append(g_t + carried)
        of_inner = total[-1] if projection is None else total[-1] @ projection
        of_cell = torch.addcmul(carried_cell if extra_t is None else carried_cell + extra_t, of_inner, by_inner_t)
        of_gates_t[..., :3, :].mul_(of_cell.unsqueeze(-2))
        of_gates_t[..., 3, :].mul_(of_inner)
        carried, carried_cell = of_gates_t.flatten(-2) @ weight, of_cell * f_t
    of_p = of_gates.flatten(-2)
    return of_p, of_p, None if projection is None else torch.stack(total[::-1]), carried, carried_cell
