"""Where the examples of a batch are in a tensor: in one of its dimensions, alone or folded with others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A dimension of the size `before * n * after`, in which n examples are the middle of three folded dimensions.

    Windows of an image in dimension 0 are an example, `after` to each; a sequence in front of the batch has the
    examples in dimension 1.

    Attributes:
        dim: The dimension.
        before: Size of what is folded in front of the examples.
        after: Size of what is folded behind them.
    """

    dim: int = 0
    before: int = 1
    after: int = 1

    def holds(self, x: Tensor, examples: int) -> bool:
        """Return whether a tensor has room for that many examples."""
        return x.dim() > self.dim and x.shape[self.dim] == self.before * examples * self.after

    def fitted(self, shape: torch.Size, examples: int) -> Layout | None:
        """Return the layout for a batch of other sizes, as a last one with fewer examples; None if there is none.

        Of two folded dimensions beside the examples, the sizes are those of the first batch.

        Args:
            shape: That of a tensor with the examples in the same place.
            examples: How many there are.
        """
        if len(shape) <= self.dim or shape[self.dim] % examples:
            return None
        folded = shape[self.dim] // examples
        if self.before == self.after == 1:
            return self if folded == 1 else None
        if self.after == 1:
            return self._replace(before=folded)
        if self.before == 1:
            return self._replace(after=folded)
        return self if folded == self.before * self.after else None

    def rolled(self, x: Tensor, examples: int, by: int = 1) -> Tensor:
        """Return a tensor with its examples rolled."""
        dim = self.dim
        return x.unflatten(dim, (self.before, examples, self.after)).roll(by, dim + 1).flatten(dim, dim + 2)

    def examples_first(self, x: Tensor, examples: int) -> Tensor:
        """Return a tensor as `(n, *, folded, *)`: examples in dimension 0, all others behind, one more than before."""
        dim = self.dim
        return x.unflatten(dim, (self.before, examples, self.after)).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


EXAMPLES = Layout()  # dimension 0 runs over the examples and nothing else
CONSTANT = Layout(-1, 0, 0)  # no dimension does: the tensor does not depend on the batch


def find_layout(old: Tensor, new: Tensor, examples: int, dims: Iterable[int]) -> Layout | None:
    """Return where the examples are in a tensor, given it again from a batch whose examples were rolled by one.

    None if nowhere, or if several places agree with what is seen.

    Args:
        old: The tensor.
        new: The tensor of the rolled batch.
        examples: Examples in the batch, at least 2.
        dims: Dimensions in which they may be.
    """
    if old.shape != new.shape:
        return None
    if old.dim() > 0 and len(old) == examples and 0 in dims and is_close(new, old.roll(1, 0)):
        return EXAMPLES
    if torch.equal(old, new):
        return CONSTANT
    errors = {
        layout: _error(new, layout.rolled(old, examples))
        for dim in dims
        for layout in _layouts(dim, old.shape[dim], examples)
    }
    least = min(errors.values(), default=2.0)
    found = [layout for layout, error in errors.items() if error <= min(1, 2 * least + 1e-3)]
    return found[0] if len(found) == 1 else None


def _layouts(dim: int, size: int, examples: int) -> list[Layout]:
    folded, rest = divmod(size, examples)
    if rest or not folded:
        return []
    return [Layout(dim, before, folded // before) for before in range(1, folded + 1) if folded % before == 0]


def is_close(new: Tensor, old: Tensor) -> bool:
    """Return whether two tensors of one shape agree but for rounding."""
    return _error(new, old) <= 1


def _error(new: Tensor, old: Tensor) -> float:
    """Return how far two tensors are apart, in units of what rounding may do."""
    if not old.is_floating_point():
        return 0.0 if torch.equal(new, old) else float("inf")
    if old.numel() == 0:
        return 0.0
    tolerance = torch.finfo(old.dtype).eps ** 0.5  # kernels round each row by its place
    distance, size = _largest(new - old), _largest(old)
    return 0.0 if float(distance) == 0 else float(distance / (tolerance * size))


def _largest(x: Tensor) -> Tensor:
    """Return the largest absolute value, without a copy."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)
