"""Triton kernels: sums over examples of per-example weight gradients and of their squares.

A program owns one tile of the weight. It computes the gradient of one example after the other in registers, and adds it
and its square to two running sums; per-example gradients never reach the memory of the GPU.

Where the weight has few tiles, further programs take parts of the batch, whose sums are added in a fixed order: the
result does not depend on how the GPU schedules its programs.
"""

# pyright: reportArgumentType=false
# A parameter of type `tl.constexpr` takes a plain value.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bayeslayers.curvature.moments import Moments
from bayeslayers.curvature.settings import Settings

_PROGRAMS = 512  # that fill a GPU: about four for each of its multiprocessors; a guess, no GPU has been timed
_SIDE = 64  # largest of a tile of the weight
_STEP = {4: 16, 2: 32}  # positions of one step by bytes of a value: more of them do not fit into the registers
_LEAST = 16  # of each dimension of `tl.dot`


@triton.jit(do_not_specialize=["n", "per_part"])
def linear_kernel(
    g, x, grad, squares, n, per_part, p, o, i, g_n, g_p, g_o, x_n, x_p, x_i,
    WITH_GRAD: tl.constexpr, PRECISION: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """Sum sum_p g_npo x_npi and its square over the examples n of one part, for one tile (o, i) of the weight.

    Source: Osawa et al. 2019 (arXiv 1906.02506), section 3, for the sum; the tiles are those of any matmul.
    """
    rows = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    columns = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    part = tl.program_id(2).to(tl.int64)
    first = part * per_part
    g += first * g_n
    x += first * x_n
    total = tl.zeros((TILE_O, TILE_I), tl.float32)
    total_squares = tl.zeros((TILE_O, TILE_I), tl.float32)
    for _ in range(0, tl.minimum(per_part, n - first)):
        gradient = tl.zeros((TILE_O, TILE_I), tl.float32)
        for start in range(0, p, TILE_P):
            positions = start + tl.arange(0, TILE_P)
            g_places = positions[None, :] * g_p + rows[:, None] * g_o
            x_places = positions[:, None] * x_p + columns[None, :] * x_i
            inside = positions < p
            g_tile = tl.load(g + g_places, mask=inside[None, :] & (rows[:, None] < o), other=0.0)
            x_tile = tl.load(x + x_places, mask=inside[:, None] & (columns[None, :] < i), other=0.0)
            gradient = tl.dot(g_tile, x_tile, gradient, input_precision=PRECISION)
        total += gradient
        total_squares += gradient * gradient
        g += g_n
        x += x_n
    places = (part * o + rows[:, None]) * i + columns[None, :]
    own = (rows[:, None] < o) & (columns[None, :] < i)
    tl.store(squares + places, total_squares, mask=own)
    if WITH_GRAD:
        tl.store(grad + places, total, mask=own)


@triton.jit(do_not_specialize=["n", "per_part"])
def convolution_kernel(
    g, x, grad, squares, n, per_part, groups, o, c, height, width, g_height, g_width,
    g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    WITH_GRAD: tl.constexpr, PRECISION: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """Do the same for a convolution of `groups` groups, each with `o` outputs and `c` inputs.

    The columns of the weight are those of the unfolded input, (channel, kernel row, kernel column), and the positions
    those of the output. An entry of the unfolded input is loaded from where it lies in the input:

        row = position row * stride + kernel row * dilation - padding, likewise for the column; 0 outside the input.

    Source: Chetlur et al. 2014 (arXiv 1410.0759), section 3, for implicit unfolding.
    """
    size: tl.constexpr = KERNEL_H * KERNEL_W
    i = c * size
    p = g_height * g_width
    rows = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    columns = tl.program_id(1) * TILE_I + tl.arange(0, TILE_I)
    part = (tl.program_id(2) // groups).to(tl.int64)
    group = tl.program_id(2) % groups
    first = part * per_part
    g += first * g_n + group * o * g_c
    x += first * x_n + group * c * x_c
    kernel_h = columns % size // KERNEL_W * dilation_h - padding_h
    kernel_w = columns % KERNEL_W * dilation_w - padding_w
    channels = columns // size * x_c
    total = tl.zeros((TILE_O, TILE_I), tl.float32)
    total_squares = tl.zeros((TILE_O, TILE_I), tl.float32)
    for _ in range(0, tl.minimum(per_part, n - first)):
        gradient = tl.zeros((TILE_O, TILE_I), tl.float32)
        for start in range(0, p, TILE_P):
            positions = start + tl.arange(0, TILE_P)
            position_h = positions // g_width
            position_w = positions % g_width
            g_places = (position_h * g_h + position_w * g_w)[None, :] + rows[:, None] * g_c
            x_h_place = (position_h * stride_h)[:, None] + kernel_h[None, :]
            x_w_place = (position_w * stride_w)[:, None] + kernel_w[None, :]
            x_places = channels[None, :] + x_h_place * x_h + x_w_place * x_w
            inside = positions < p
            meets = (x_h_place >= 0) & (x_h_place < height) & (x_w_place >= 0) & (x_w_place < width)
            g_tile = tl.load(g + g_places, mask=inside[None, :] & (rows[:, None] < o), other=0.0)
            x_tile = tl.load(x + x_places, mask=meets & inside[:, None] & (columns[None, :] < i), other=0.0)
            gradient = tl.dot(g_tile, x_tile, gradient, input_precision=PRECISION)
        total += gradient
        total_squares += gradient * gradient
        g += g_n
        x += x_n
    places = ((part * groups + group) * o + rows[:, None]) * i + columns[None, :]
    own = (rows[:, None] < o) & (columns[None, :] < i)
    tl.store(squares + places, total_squares, mask=own)
    if WITH_GRAD:
        tl.store(grad + places, total, mask=own)


def linear(g: Tensor, x: Tensor, with_grad: bool, precision: str) -> Moments:
    """Return the sums of a linear map.

    Args:
        g: Gradient of the output, `(n, p, o)`.
        x: Input, `(n, p, i)`.
        with_grad: Whether to sum the gradients, not only their squares.
        precision: Of products of float32 values, as `tl.dot` takes it.
    """
    (n, p, o), i = g.shape, x.shape[2]

    def launch(grid: Any, sums: tuple[Tensor, Tensor], per_part: int, tile: Any) -> None:
        strides = (*g.stride(), *x.stride())
        linear_kernel[grid](
            g, x, *sums, n, per_part, p, o, i, *strides, WITH_GRAD=with_grad, PRECISION=precision, **tile
        )

    return _in_parts(launch, g, with_grad, n, 1, o, i, p)


def convolution(x: Tensor, g: Tensor, weight: Tensor, settings: Settings, with_grad: bool, precision: str) -> Moments:
    """Return the sums of a convolution in two dimensions that is not transposed.

    Args:
        x: Input, `(n, c_in, h, w)`.
        g: Gradient of the output.
        weight: Of which only the shape is read.
        settings: Of the convolution.
        with_grad: Whether to sum the gradients, not only their squares.
        precision: Of products of float32 values, as `tl.dot` takes it.
    """
    n, groups, (c_out, c, *kernel) = len(x), settings.groups, weight.shape
    o = c_out // groups
    numbers = [
        *(groups, o, c, *x.shape[2:], *g.shape[2:], *g.stride(), *x.stride(), *kernel),
        *(*settings.stride, *settings.padding, *settings.dilation),
    ]

    def launch(grid: Any, sums: tuple[Tensor, Tensor], per_part: int, tile: Any) -> None:
        convolution_kernel[grid](g, x, *sums, n, per_part, *numbers, WITH_GRAD=with_grad, PRECISION=precision, **tile)

    sums = _in_parts(launch, g, with_grad, n, groups, o, c * kernel[0] * kernel[1], g.shape[2:].numel())
    return sums.map(lambda total: total.view(weight.shape))


def _in_parts(
    launch: Callable[[Any, tuple[Tensor, Tensor], int, Any], None],
    like: Tensor,
    with_grad: bool,
    n: int,
    groups: int,
    o: int,
    i: int,
    p: int,
) -> Moments:
    """Return the sums `(groups * o, i)` of all parts of the batch, of which there are as many as fill the GPU."""
    sides = _side(o, _SIDE), _side(i, _SIDE), _side(p, _STEP[like.element_size()])
    tile = dict(TILE_O=sides[0], TILE_I=sides[1], TILE_P=sides[2], num_warps=8 if min(sides[:2]) == _SIDE else 4)
    tiles = triton.cdiv(o, sides[0]), triton.cdiv(i, sides[1])
    per_part = triton.cdiv(n, min(n, max(1, _PROGRAMS // (groups * tiles[0] * tiles[1]))))
    parts = triton.cdiv(n, per_part)
    squares = like.new_empty(parts, groups * o, i, dtype=torch.float32)
    grad = torch.empty_like(squares) if with_grad else squares
    launch((*tiles, parts * groups), (grad, squares), per_part, tile)
    sums = Moments(grad if with_grad else None, squares)
    return sums.map(lambda total: total[0] if parts == 1 else total.sum(0))


def _side(size: int, largest: int) -> int:
    """Return the side of a tile."""
    return min(largest, max(_LEAST, triton.next_power_of_2(size)))
