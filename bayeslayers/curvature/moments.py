"""Sums over examples of per-example gradients and of their squares, without holding the gradients of a whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks, tile_elements
from bayeslayers.dtypes import at_least_float32

_FEW = 4  # examples of a tile: below, one matmul for each example is faster than a batched one


class Moments:
    """Two running sums over examples: of the gradients of a weight, and of their squares.

    Attributes:
        grad: Sum of the gradients; None where it is not asked for.
        squares: Sum of the squares.
    """

    def __init__(self, grad: Tensor | None, squares: Tensor) -> None:
        self.grad, self.squares = grad, squares

    @staticmethod
    def zeros(like: Tensor, *shape: int, with_grad: bool = True) -> Moments:
        """Return sums of no example.

        Args:
            like: Tensor of their device, and of their dtype if that is float32 or wider.
            *shape: Of the weight.
            with_grad: Whether to sum the gradients too.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        squares = like.new_zeros(shape, dtype=dtype)
        return Moments(torch.zeros_like(squares) if with_grad else None, squares)

    def part(self, index: Any) -> Moments:
        """Return the sums of a part of the weight, which share their memory with these.

        Args:
            index: Index of the part.
        """
        return self.map(lambda total: total[index])

    @staticmethod
    def joined(parts: Sequence[Moments]) -> Moments:
        """Return the sums of a weight whose parts, in dimension 0, are given.

        Args:
            parts: Sums of the parts.
        """
        grads = [part.grad for part in parts if part.grad is not None]
        return Moments(torch.cat(grads) if grads else None, torch.cat([part.squares for part in parts]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """Return what a function makes of each of the sums.

        Args:
            change: The function, as one that changes the shape.
        """
        return Moments(None if self.grad is None else change(self.grad), change(self.squares))

    def add(self, per_example: Tensor) -> None:
        """Add the gradients of some examples, `(n, *shape)`, whose memory is overwritten.

        Args:
            per_example: The gradients; of half precision, they are squared in float32.
        """
        per_example = at_least_float32(per_example)
        alone = len(per_example) == 1
        if self.grad is not None:
            self.grad.add_(per_example[0] if alone else per_example.sum(0))
        per_example.mul_(per_example)  # no other op in place squares under vmap
        self.squares.add_(per_example[0] if alone else per_example.sum(0))

    def add_products(self, g: Tensor, x: Tensor) -> None:
        """Add the gradients sum_p g_npo x_npi of all examples.

        They exist in tiles that stay in the cache of a CPU, of some examples or of some rows of one example's.

        Args:
            g: Gradient of the output, `(n, p, o)`.
            x: Input, `(n, p, i)`.
        """
        rows, columns = self.squares.shape
        if tile_elements(g) >= _FEW * rows * columns or torch.compiler.is_compiling():  # a graph has no use for tiles
            for chunk in chunks(len(g), rows * columns, g):
                self.add(g[chunk].mT @ x[chunk])
            return
        tiles = math.ceil(rows * columns / tile_elements(g))
        size = math.ceil(rows / tiles)
        examples = list(zip(g.unbind(0), x.unbind(0), strict=True))
        for start in range(0, rows, size):
            tile = slice(start, start + size)
            sums = self.part(tile)
            for g_row, x_row in examples:
                sums.add((g_row[:, tile].mT @ x_row)[None])

    def add_pairs(self, g: Tensor, x: Tensor) -> None:
        """Add the same as `add_products` without per-example gradients: the square is written out.

            sum_n (sum_p g_npo x_npi)^2 = sum_n sum_pq g_npo g_nqo x_npi x_nqi

        Args:
            g: Gradient of the output, `(n, p, o)`.
            x: Input, `(n, p, i)`.
        """
        if self.grad is not None:
            self.grad.add_(g.flatten(0, 1).t() @ x.flatten(0, 1))
        self.squares.add_((_pairs(g).t() @ _pairs(x, off_diagonal=2.0)).clamp(min=0))  # rounding may end below


def _pairs(x: Tensor, off_diagonal: float = 1.0) -> Tensor:
    """Return x_np x_nq for each pair p <= q of positions, `(n * pairs, features)`."""
    if x.shape[1] == 1:
        return x.flatten(0, 1).square()
    p, q = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    weight = torch.where(p == q, 1.0, off_diagonal).to(x.dtype)
    return (x[:, p] * x[:, q] * weight[:, None]).flatten(0, 1)
