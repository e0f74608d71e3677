"""How many elements a loss is a mean over: what makes the squares of its gradients a curvature.

A loss that is a mean over M elements (pixels, tokens, labels) has the curvature

    1/M sum_e F_e ~ M sum_i G_i^2

with G_i the part of its gradient that comes from example i: the elements are independent given the
output, so (M G_i)^2 has the expectation sum_{e in i} F_e. Of one element an example, M is the batch's
size. In a mean over weighted elements, and in a sum of several losses, Kish's effective number stands
for M (`counts.effective_number`), which is exact where all F_e are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bayeslayers.curvature.counts import LOSSES, Count, Number, Reduction, count
from bayeslayers.readings import read

_SEEN = frozenset({*LOSSES, Tensor.backward})
_LARGEST_RATIO = 2.0  # of the numbers of elements of losses that one effective number may stand for
_SCALINGS = ("MulBackward0", "DivBackward0", "NegBackward0", "AddBackward0", "SubBackward0", "ToCopyBackward0")
_SHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward0", "SqueezeBackward1")


class Elements(NamedTuple):
    """What the losses of a scope say together.

    Attributes:
        number: Elements that the loss is a mean over, M; the number of examples where it is a sum over theirs.
        examples: Examples that have one of them.
        reduction: Of the loss functions; None where none was seen, or they differ.
        factor: The largest number that one of them was multiplied by.
    """

    number: float
    examples: int
    reduction: Reduction | None = None
    factor: float = 1.0


class _Term(NamedTuple):
    """A loss that went backward: what multiplied it on the way, and the pass."""

    count: Count
    reduction: Reduction
    factor: Number
    backward: int

    def known(self, values: Mapping[int, Any]) -> _Term:
        """Return the term without tensors, whose values are given by their `id`."""
        elements, examples = (values.get(id(x), x) for x in (self.count.elements, self.count.examples))
        count = Count(elements, examples, self.count.rows)
        return self._replace(count=count, factor=abs(values.get(id(self.factor), self.factor)))


class _Root(NamedTuple):
    """What went backward, where it is a mean or a sum as a whole.

    Attributes:
        elements: Elements that it is the mean or the sum of.
        divisor: What the sum is divided by; None if by nothing.
        before: Elements that each of them is a mean over.
    """

    elements: float
    divisor: Number | None
    before: float

    @property
    def number(self) -> float:
        """Elements that it is a mean over: of a masked mean its divisor, of another sum 0, for it does not tell."""
        return 0.0 if self.divisor is None or self.divisor > self.elements else float(self.divisor)


class Seen(NamedTuple):
    """The losses that went backward. Their numbers may still be on the device."""

    terms: tuple[_Term, ...]
    roots: tuple[_Root, ...]

    def tensors(self) -> list[Tensor]:
        """Return the tensors whose values `elements` needs."""
        numbers = [x for t in self.terms for x in (t.factor, t.count.elements, t.count.examples)]
        numbers += [root.divisor for root in self.roots]
        return list({id(x): x for x in numbers if isinstance(x, Tensor)}.values())

    def elements(self, values: Sequence[float], examples: int, elements_per_example: float | None = None) -> Elements:
        """Return what the losses average.

        Args:
            values: Those of `tensors()`.
            examples: Examples that went backward.
            elements_per_example: As the user names it; None for what was seen, 1 where nothing was.

        Raises:
            ValueError: If losses over very different numbers of elements were added.
        """
        known: dict[int, Any] = dict(zip(map(id, self.tensors()), values, strict=True))
        terms = [term.known(known) for term in self.terms]
        terms = [term for term in terms if term.factor > 0 and term.count.elements > 0]
        labelled = _labelled(terms, examples)
        kinds: set[Reduction] = {term.reduction for term in terms}
        declared = kinds.pop() if len(kinds) == 1 else None, max((float(t.factor) for t in terms), default=1.0)
        if elements_per_example is not None:
            return Elements(elements_per_example * labelled, labelled, *declared)
        if not terms:
            roots = [root._replace(divisor=known.get(id(root.divisor), root.divisor)) for root in self.roots]
            number = sum((root.number or examples / len(roots)) * root.before for root in roots)
            return Elements(max(number, examples), examples)
        return Elements(_together([_as_mean(term, labelled) for term in terms]), labelled, *declared)


class LossFunctions(TorchFunctionMode):
    """Sees the loss functions of torch that are called inside, and which of them go backward.

    A loss of another make is seen where the whole of it is a mean, times numbers: a node of its graph
    then says over how many elements. A loss inside `torch.compile` is not seen.

    Attributes:
        batched: Functions run under `vmap`, and what they return goes backward.
        paused: Losses are not the user's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batched = self.paused = False
        self.clear()

    def clear(self) -> None:
        """Forget the losses."""
        self._terms: list[_Term] = []
        self._roots: list[_Root] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # As short as can be: it runs for each function, and torch.compile traces it.
        if func in _SEEN and not self.paused and not torch.compiler.is_compiling():
            return self._call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that tells of a loss."""
        if func is Tensor.backward:
            self._see_root(args[0])
        output = func(*args, **kwargs)
        if torch.is_grad_enabled() and (found := count(func, args, kwargs)):
            self._see(output, *found)
        return output

    def _see(self, loss: Tensor, found: Count, reduction: Reduction) -> None:
        if self.batched:
            self._terms.append(_Term(found, reduction, 1.0, 0))
        elif loss.requires_grad:
            refuse_empty(found.rows)
            # The gradient that arrives at a loss is the number that multiplied it.
            loss.register_hook(
                lambda factor: self._terms.append(
                    _Term(found, reduction, factor.detach(), torch._C._current_graph_task_id())
                )
            )

    def _see_root(self, loss: Tensor) -> None:
        """Note the elements of a loss that is a mean or a sum times numbers, and those that were averaged before."""
        # Of several draws at once the root is a sum over them; vmap writes their means and sums dimension by dimension.
        node: Any = _only_parent(loss.grad_fn) if self.batched else loss.grad_fn
        divisor = None
        while type(node).__name__ in _SCALINGS:
            divisor = getattr(node, "_saved_other", None) if type(node).__name__ == "DivBackward0" else divisor
            node = _only_parent(node)
        mean, total = (f"{kind}Backward{int(self.batched)}" for kind in ("Mean", "Sum"))
        if type(node).__name__ not in (mean, total):
            return
        sizes = _reduced_sizes(node) if self.batched else torch.Size(node._saved_self_sym_sizes)
        refuse_empty(sizes[0] if sizes else 1)
        elements: float = sizes.numel()
        if type(node).__name__ == mean:
            divisor = elements
        elif divisor is not None:  # a number of elements, as in a masked mean, or of examples
            divisor = divisor.detach().clone()  # which may be counted on in place
        self._roots.append(_Root(elements, divisor, _averaged_before(_only_parent(node))))

    def seen(self) -> Seen:
        """Return the losses that went backward so far."""
        return Seen(tuple(self._terms), tuple(self._roots))

    def elements(self, examples: int, elements_per_example: float | None = None) -> Elements:
        """Return what the losses that went backward average; see `Seen.elements`.

        Args:
            examples: Examples that went backward.
            elements_per_example: As the user names it.
        """
        seen = self.seen()
        return seen.elements(read(seen.tensors()), examples, elements_per_example)


def refuse_empty(rows: int) -> None:
    """Raise if a batch has no example.

    Args:
        rows: Size of dimension 0.

    Raises:
        ValueError: If it is 0.
    """
    if rows == 0:
        raise ValueError(
            "the batch must hold at least one example, got an empty batch. The step is rejected, and the "
            "posterior is unchanged. Leave such a batch out."
        )


def refuse_other_reduction(seen: Elements, declared: Reduction, loss_scale: float = 1.0) -> None:
    """Raise if a loss is seen to be a sum over the batch where it should be a mean, or a mean where it should be a sum.

    A sum that is divided afterwards can be a mean, and a mean that is multiplied a sum.

    Args:
        seen: What was seen.
        declared: What the loss should be.
        loss_scale: Factor of a gradient scaler.

    Raises:
        ValueError: If so.
    """
    factor = seen.factor / loss_scale
    if seen.examples < 2 or seen.reduction in (None, declared) or (factor < 1 if declared == "mean" else factor > 1):
        return
    raise ValueError(
        f"the loss must be a {declared} over the batch's examples, got one with reduction={seen.reduction!r}. The step "
        f"is rejected, and the posterior is unchanged. Use reduction={declared!r} in the loss, or give an optimiser "
        f"that has it loss_reduction={seen.reduction!r}."
    )


def _only_parent(node: Any) -> Any:
    """Return the one node whose output a node of a graph computes with; None if there are several, or no graph."""
    parents = [] if node is None else [parent for parent, _ in node.next_functions if parent is not None]
    return parents[0] if len(parents) == 1 else None


def _averaged_before(node: Any) -> float:
    """Return over how many elements per entry a tensor is a mean, dimension by dimension."""
    elements = 1.0
    while type(node).__name__ in (*_SCALINGS, *_SHAPES, "MeanBackward1"):
        if type(node).__name__ == "MeanBackward1":
            elements *= _reduced_sizes(node).numel()
        node = _only_parent(node)
    return elements


def _reduced_sizes(node: Any) -> torch.Size:
    """Return the sizes of the dimensions that a mean or a sum by dimension goes over."""
    sizes = node._saved_self_sym_sizes
    return torch.Size(sizes[d - 2**64 if d >= 2**63 else d] for d in node._saved_dim or range(len(sizes)))


def _labelled(terms: Sequence[_Term], examples: int) -> int:
    """Return how many examples have an element that counts; all, where a loss's rows are not the examples."""
    passes = {task: [t for t in terms if t.backward == task] for task in {term.backward for term in terms}}
    if sum(max(term.count.rows for term in own) for own in passes.values()) != examples:
        return examples
    return int(sum(max(float(term.count.examples) for term in own) for own in passes.values()))


def _as_mean(term: _Term, examples: int) -> _Term:
    """Return a sum as the mean that it is, times a number: over the examples, or over all elements."""
    if term.reduction == "mean":
        return term
    number = min(max(1 / term.factor, examples), float(term.count.elements))
    return term._replace(count=term.count._replace(elements=number), factor=term.factor * number)


def _together(terms: Sequence[_Term]) -> float:
    """Return the effective number of elements of losses that are added.

        M = a sum_j a_j / sum_j a_j^2 / M_j

    with a_j the factors, and a the largest of a pass, summed over passes: a factor that all share
    changes nothing, whether it belongs to the likelihood, to the parts of a batch or to a gradient scaler.
    """
    largest: dict[int, float] = {}
    for term in terms:
        largest[term.backward] = max(largest.get(term.backward, 0.0), float(term.factor))
        own = [float(t.count.elements) for t in terms if t.backward == term.backward]
        if max(own) > _LARGEST_RATIO * min(own):
            raise ValueError(
                f"losses that are added must be means over about as many elements, got means over {min(own):.0f} and "
                f"{max(own):.0f}: no number makes the squares of such gradients a curvature. Add sums over the "
                "elements of each example, give elements_per_example, or use IVON."
            )
    factors = [float(term.factor) for term in terms]
    squares = sum(a * a / float(term.count.elements) for a, term in zip(factors, terms, strict=True))
    return sum(largest.values()) * sum(factors) / squares
