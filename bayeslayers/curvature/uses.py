"""The curvature of layers that run several times in one call, and of those whose examples are folded with others.

The per-example gradient of a layer that is used k times is the sum over its uses, so the uses count as further
positions: its backward nodes keep input and output gradient until the backward pass has ended, and the sum over uses is
squared once. If what is kept outgrows the per-example gradients, these are kept in its place. Tensors that several
layers share (tied weights) add up likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import Part, chunks, sum_of_squares
from bayeslayers.curvature.block import outer_products
from bayeslayers.curvature.layout import Layout
from bayeslayers.curvature.op import Use
from bayeslayers.curvature.refusal import CurvatureRefusal
from bayeslayers.dtypes import at_least_float32, full_precision

Sums = dict[int, Tensor]  # by the id of the leaf that receives it


class Kept(NamedTuple):
    """One use of an op, kept until the others have come.

    Attributes:
        rule: The op's `CurvatureRule`.
        use: The use, with the examples first.
        g: Gradient of the output, likewise.
        folded: Rows of each example in dimension 0, one after the other; 0 where dimension 1 holds the positions.
        leaves: What receives the sums.
        size: Size of the first Kronecker factor; 0 where squares are summed.
    """

    rule: Any
    use: Use
    g: Tensor
    folded: int
    leaves: tuple[Tensor | None, ...]
    size: int

    def merges(self, other: Kept) -> bool:
        """Return whether both can be one use with further positions."""
        same = self.rule is other.rule and [*map(id, self.leaves)] == [*map(id, other.leaves)]
        return same and self.folded == other.folded == 0 and self.use.settings == other.use.settings

    def select(self, chunk: slice) -> tuple[Use, Tensor]:
        """Return the use by some of the examples."""
        rows = max(self.folded, 1)
        own = slice(chunk.start * rows, chunk.stop * rows)
        return self.use._replace(inputs=tuple([x[own] for x in self.use.inputs])), self.g[own]

    def of_part(self, part: Part) -> Kept:
        """Return the use by the part of the examples from which sums are estimated."""
        rows = max(self.folded, 1)
        tensors = [x.unflatten(0, (-1, rows)) for x in (*self.use.inputs, self.g)]
        *inputs, g = [x.flatten(0, 1) for x in part.select(*tensors)[1]]
        return self._replace(use=self.use._replace(inputs=tuple(inputs)), g=g)


def keep(
    rule: Any,
    use: Use,
    g: Tensor,
    leaves: Sequence[Tensor | None],
    layout: Layout,
    examples: int,
    size: int = 0,
) -> Kept:
    """Return a use of an op with its examples brought to dimension 0.

    Args:
        rule: The op's `CurvatureRule`.
        use: The use.
        g: Gradient of its output.
        leaves: What receives the sums, in the order of the rule's tensors.
        layout: Where the examples are in inputs and output.
        examples: How many there are.
        size: Size of the first Kronecker factor; 0 where squares are summed.
    """
    wanted = [leaf is not None for leaf in leaves]
    use = use._replace(needs=(False,) * (len(use.inputs) + len(use.tensors)) + tuple(wanted))
    positions: tuple[Use, Tensor] | None = rule.as_positions(use, g, layout, examples)
    if positions is not None:
        return Kept(rule, *positions, 0, tuple(leaves), size)
    folded = layout.before * layout.after
    inputs = tuple([layout.examples_first(x, examples).flatten(0, 1) for x in use.inputs])
    g = layout.examples_first(g, examples).flatten(0, 1)
    return Kept(rule, use._replace(inputs=inputs), g, folded, tuple(leaves), size)


@dataclass
class Uses:
    """The uses of some layers that share leaves, in one backward pass.

    Attributes:
        name: Of a layer among them.
        examples: Examples of the batch.
        calls: The calls of the model that the uses belong to.
        kept: What has come.
        rows: By leaf, per-example gradients that earlier uses were folded into.
        leaves: By id, all that receive sums.
    """

    name: str
    examples: int
    calls: set[int] = field(default_factory=set)
    kept: list[Kept] = field(default_factory=list)
    rows: Sums = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    part: Part | None = None

    def add(self, kept: Kept) -> None:
        """Add a use; where the kept ones outgrow the per-example gradients, keep these."""
        self.kept.append(kept)
        self.part = kept.use.part
        self.leaves |= {id(leaf): leaf for leaf in kept.leaves if leaf is not None}
        elements = sum(x.numel() for each in self.kept for x in (*each.use.inputs, each.g))
        if kept.size == 0 and len(self.kept) > 1 and elements > self.examples * self._numel():
            self._fold()

    def sums(self) -> Sums:
        """Return what each leaf receives.

        Raises:
            CurvatureRefusal: If Kronecker factors are asked for, which these uses do not have together.
        """
        first = self.kept[0] if self.kept else None
        if first is not None and not self.rows and all(each.merges(first) for each in self.kept):
            return self._merged(first)
        if first is not None and first.size:
            raise CurvatureRefusal(
                self.name,
                f"layer '{self.name}' must run once in each call under K-FAC and Laplace's 'kron' and 'full', for its "
                "uses have no such curvature together. Use a diagonal one, or exclude the layer from the Bayesian "
                "ones.",
            )
        return self._squares()

    def _merged(self, first: Kept) -> Sums:
        use, g = first.use, first.g
        if len(self.kept) > 1:
            columns = zip(*[each.use.inputs for each in self.kept], strict=True)
            use = use._replace(inputs=tuple([torch.cat(column, 1) for column in columns]))
            g = torch.cat([each.g for each in self.kept], 1)
        if first.size and len(first.leaves) == 1:
            found = outer_products(first.rule, use, g)
        elif first.size:
            found = first.rule.factors(use, g, first.size)
        else:
            found = first.rule.kernel_for(g.device.type)(use, g)
        found = found[-len(first.leaves) :]
        pairs = zip(first.leaves, found, strict=True)
        return {id(leaf): x for leaf, x in pairs if leaf is not None and x is not None}

    def _squares(self) -> Sums:
        """Return the sums of the squares of per-example gradients, added over uses in chunks of examples."""
        kept, rows, examples, factor = self.kept, self.rows, self.examples, 1.0
        if self.part is not None:
            kept = [each.of_part(self.part) for each in kept]
            rows = {key: self.part.select(x)[1][0] for key, x in rows.items()}
            factor, (like,) = self.part.select(torch.empty(examples))
            examples = len(like)
        totals: Sums = {}
        for chunk in chunks(examples, self._numel(), self._like()):
            for key, gradients in _per_example(kept, chunk, rows).items():
                squares = sum_of_squares(gradients)
                totals[key] = totals[key] + squares if key in totals else squares
        return {key: total * factor for key, total in totals.items()}

    def _fold(self) -> None:
        """Put the per-example gradients of what is kept in its place."""
        parts = [_per_example(self.kept, c, self.rows) for c in chunks(self.examples, self._numel(), self._like())]
        self.rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self.kept.clear()

    def _numel(self) -> int:
        return sum(leaf.numel() for leaf in self.leaves.values())

    def _like(self) -> Tensor:
        return at_least_float32(self.kept[0].g if self.kept else next(iter(self.rows.values())))


def _per_example(kept: Iterable[Kept], chunk: slice, rows: Sums) -> Sums:
    """Return the per-example gradients of some examples, added over uses, by leaf."""
    added: Sums = {key: x[chunk] for key, x in rows.items()}
    for each in kept:
        use, g = each.select(chunk)
        with full_precision(g.device.type):
            found = each.rule.per_example(use, g)
        for leaf, gradients in zip(each.leaves, found, strict=True):
            if leaf is None or gradients is None:
                continue
            gradients = at_least_float32(gradients)
            if each.folded > 1:
                gradients = gradients.unflatten(0, (-1, each.folded)).sum(1)
            added[id(leaf)] = added[id(leaf)] + gradients if id(leaf) in added else gradients
    return added


def own_sums(kept: Kept, name: str, examples: int) -> list[Tensor | None]:
    """Return what the leaves of one use receive, in their order."""
    uses = Uses(name, examples)
    uses.add(kept)
    found: Any = uses.sums()
    return [found.get(id(leaf)) for leaf in kept.leaves]
