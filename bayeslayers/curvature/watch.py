"""What a tracker knows of the calls of its model: how often each layer runs in one, and where its examples are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayeslayers.curvature.layout import CONSTANT, EXAMPLES, Layout
from bayeslayers.curvature.lifted import Lifted, Meetings
from bayeslayers.curvature.op import Use
from bayeslayers.curvature.refusal import CurvatureRefusal, Origin
from bayeslayers.curvature.uses import Uses, keep, own_sums

AS_WEIGHT = " as a weight"  # behind the name of a read parameter, where an op takes it that has a curvature rule


class Observed(NamedTuple):
    """What an op was called with while the model was looked at, and the dimensions that may hold examples."""

    input: Tensor
    dims: tuple[int, ...]


Note: TypeAlias = Callable[[str, int, Tensor, tuple[int, ...]], Any]


def copied(name: str, index: int, x: Tensor, dims: tuple[int, ...]) -> Observed:
    """Return what an op was called with, which may be overwritten after it."""
    return Observed(x.clone(), dims)


class Watch:
    """The state of one tracker: its open call of the model, and what has come in each backward pass.

    Args:
        groups: By layer or read, the first of those that it shares tensors with; only of those that share some.
        reads: Names of the parameters that are tracked where modules read them.

    Attributes:
        examples: Examples of the call that is open; None outside of one.
        layouts: By layer, where the examples are in each of its uses in a call; None where that is not known.
        looked: By layer, the shapes of the inputs of its uses in the look at the call that is open.
        observed: Where a look at the model collects what it notes of its ops' inputs, None outside of one.
        note: Returns that of an op's name, the number of the use, its input, and the dimensions that may hold examples.
        captured: What the leaves receive in place of their `.grad`, where that is asked for.
        meetings: Of tensors that do not depend on the batch with those that do.
        counted: By layer or read, the examples that went backward, of those uses whose place is known.
        check: Refuses a pass by what one use in it adds to a layer's tally: name, examples, uses and the pass.
    """

    def __init__(
        self,
        groups: Mapping[str, str] | None = None,
        reads: frozenset[str] = frozenset(),
        check: Callable[[str, int, int, int], None] | None = None,
    ) -> None:
        self.examples: int | None = None
        self.layouts: dict[str, list[Layout | None]] = {}
        self.looked: dict[str, list[torch.Size]] = {}
        self.observed: dict[str, list[Any]] | None = None
        self.note: Note = copied
        self.captured: dict[int, Tensor] | None = None
        self.groups: Mapping[str, str] = groups or {}
        self.meetings = Meetings()
        self.reads, self.check = reads, check
        self.clear()

    def clear(self) -> None:
        """Forget the calls and passes of the last scope."""
        self.call, self.sizes = 0, set[int]()
        self.counted = Counter[str]()
        self._counts: dict[str, int] = {}  # uses in the open call
        self.repeated = set[str]()  # layers and reads with several uses in one call
        self._passes: dict[int, dict[str, Uses]] = {}
        self._tallied: set[tuple[int, str]] = set()
        self.collected: set[tuple[int, str]] = set()
        self.close_call()

    def open_call(self, examples: int) -> None:
        """Begin a call of the model."""
        self.examples = examples
        self.call += 1
        self.sizes.add(examples)
        self._counts.clear()
        self.meetings.index = 0

    def close_call(self) -> None:
        """End it."""
        self.examples = None
        self.looked = {}

    def observe(self, name: str, x: Tensor, output: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Note what an op got while the model is looked at, and return its output, lifted if known to be constant."""
        assert self.observed is not None
        uses, known = self.observed.setdefault(name, []), self.layouts.get(name, ())
        uses.append(self.note(name, len(uses), x.detach(), dims))
        if self.examples is None or len(uses) > len(known) or known[len(uses) - 1] != CONSTANT:
            return output
        rows = output.expand(self.examples, *output.shape).clone()  # an op in place may follow
        return Lifted.of(rows, self.meetings, Origin("the output of layer", name))

    def enter(self, name: str, x: Tensor) -> Place | None:
        """Return where the examples of a use are, None if that is not known."""
        known = self.layouts.get(name)
        if self.examples is None:  # a layer called by itself, or run again by checkpointing
            sizes = self.sizes if torch._C._current_graph_task_id() != -1 else ()
            if len(sizes) != 1 or not known or len(set(known)) != 1:
                return None
            (examples,), index, call = sizes, 0, None
        else:
            examples, index, call = self.examples, self._count(name), self.call
        layout = _layout_of(known, index, x, examples)
        if layout is not EXAMPLES and call is not None and self._is_ragged(name, index, x, layout):
            raise CurvatureRefusal(
                name,
                f"layer '{name}' must get as many rows from each example, got an input of shape {tuple(x.shape)} for "
                f"{examples} examples, whose rows are not as many from each, like the proposals of a detector. Use "
                "IVON, or exclude the layer from the Bayesian ones.",
            )
        if layout == CONSTANT and call is None:
            raise CurvatureRefusal(
                name,
                f"layer '{name}', whose input does not depend on the batch, must run outside of activation "
                "checkpointing. Exclude it from the Bayesian layers, or use IVON.",
            )
        return None if layout is None else Place(self, name.removesuffix(AS_WEIGHT), layout, examples, call)

    def enter_read(self, name: str) -> Place | None:
        """Return the place of a read of a parameter, by the module that owns it; None outside of a call of the model.

        Args:
            name: Of the parameter.
        """
        if self.examples is not None:
            examples, call = self.examples, self.call
            self._count(name)
        elif len(self.sizes) == 1 and torch._C._current_graph_task_id() != -1:  # checkpointing runs it again
            (examples,), call = self.sizes, None
            self.repeated.add(name)  # as it may be: of how many reads is not known
        else:
            return None
        return Place(self, name, EXAMPLES, examples, call)

    def _is_ragged(self, name: str, index: int, x: Tensor, layout: Layout | None) -> bool:
        """Return whether a use has another number of rows than its examples can have alike, or than the look saw."""
        known = self.layouts.get(name, [])[index : index + 1]
        if layout is None:
            return known not in ([], [None])
        if layout in (EXAMPLES, CONSTANT) or name not in self.looked or not known:
            return False
        return self.looked[name][index][layout.dim] != x.shape[layout.dim]

    def _count(self, name: str) -> int:
        """Count a use in the open call, and return how many came before it there."""
        index = self._counts[name] = self._counts.get(name, -1) + 1
        if index > 0:
            self.repeated.add(name)
        return index

    def runs_again(self, name: str) -> bool:
        """Return whether uses of a layer, or of one that it shares tensors with, must be added before squaring."""
        return name in self.repeated or name in self.groups or len(self.layouts.get(name, ())) > 1

    def must_collect(self, name: str) -> bool:
        """Return whether a layer shares tensors, or its examples are known to be elsewhere than in dimension 0."""
        return name in self.groups or any(layout not in (None, EXAMPLES) for layout in self.layouts.get(name, ()))

    def open_pass(self, task: int) -> dict[str, Uses]:
        """Return the uses that have come in a backward pass, which is now running."""
        if task not in self._passes:
            self._passes[task] = {}
            _at_the_end(lambda: self._close_pass(task))
        return self._passes[task]

    def is_first(self, task: int, name: str) -> bool:
        """Return whether a layer has not been tallied in a backward pass, in which it is now."""
        first = (task, name) not in self._tallied
        self._tallied.add((task, name))
        return first

    @torch.no_grad()
    def _close_pass(self, task: int) -> None:
        for uses in self._passes.pop(task, {}).values():
            if len(uses.calls) > 1:
                raise CurvatureRefusal(uses.name, f"layer '{uses.name}' {ONE_CALL}")
            for key, value in uses.sums().items():
                self._deliver(uses.leaves[key], value)

    def _deliver(self, leaf: Tensor, value: Tensor) -> None:
        if self.captured is not None:
            self.captured[id(leaf)] = value
            return
        value = value.to(leaf.dtype)
        leaf.grad = value if leaf.grad is None else leaf.grad + value


ONE_CALL = (
    "must run in one call of the model for each backward pass, for only there its uses are known to belong to the same "
    "examples. Call the model once for each backward pass, as a whole and not compiled, and without vectorise; put "
    "calls of the same examples into one module. Or use IVON, or exclude the layer from the Bayesian ones."
)


@dataclass(slots=True, eq=False)  # not frozen: it is made at each use, which would cost four times as much
class Place:
    """One use of a layer in a call of the model.

    Attributes:
        watch: State of the tracker.
        name: The layer's name.
        layout: Where the examples are.
        examples: How many there are.
        call: The call; None where checkpointing runs the layer again, in the backward pass.
    """

    watch: Watch
    name: str
    layout: Layout
    examples: int
    call: int | None

    @property
    def collects(self) -> bool:
        """Whether the use has others to be added to, or examples to be unfolded."""
        return self.layout != EXAMPLES or self.watch.runs_again(self.name)

    def lifted(self, folded: int = 1) -> Place:
        """Return the place of the use with a copy of its input for each example.

        Args:
            folded: Rows of a copy that are folded behind the examples.
        """
        return replace(self, layout=Layout(0, 1, folded))

    def count(self, recomputed_in: int, examples: int | None = None) -> None:
        """Count the use, which goes backward as its place says, neither compiled nor under vmap.

        Args:
            recomputed_in: The backward pass that ran the forward again; -1 if none did.
            examples: How many go backward; None where another use of the layer has counted them.
        """
        watch, name = self.watch, self.name
        task = recomputed_in if recomputed_in != -1 else torch._C._current_graph_task_id()
        watch.collected.add((task, name))
        if examples is not None:
            watch.counted[name] = watch.counted.get(name, 0) + examples
            if watch.check is not None:
                watch.check(name, examples, 1, task)

    def collect(
        self,
        rule: Any,
        use: Use,
        g: Tensor,
        leaves: Sequence[Tensor | None],
        size: int,
        recomputed_in: int,
    ) -> Sequence[Tensor | None]:
        """Return the sums of this use, or keep it for the end of the backward pass."""
        wanted = use.needs[-len(leaves) :]
        task = torch._C._current_graph_task_id() if recomputed_in == -1 else recomputed_in
        alone = not self.watch.runs_again(self.name)
        sums: Sequence[Tensor | None] = [None] * len(leaves)
        if any(wanted):
            own = [leaf if want else None for leaf, want in zip(leaves, wanted, strict=True)]
            kept = keep(rule, use, g, own, self.layout, self.examples, size)
            if alone:
                sums = own_sums(kept, self.name, self.examples)
            else:
                group = self.watch.groups.get(self.name, self.name)
                uses = self.watch.open_pass(task).setdefault(group, Uses(self.name, self.examples))
                uses.calls |= set() if self.call is None else {self.call}
                uses.add(kept)
        first = alone or self.watch.is_first(task, self.name)
        self.count(recomputed_in, self.examples if first else None)
        return sums


def _layout_of(known: list[Layout | None] | None, index: int, x: Tensor, examples: int) -> Layout | None:
    if examples == 1:  # all belongs to the one example
        return Layout(0, 1, len(x))
    if not known:
        return None
    if index < len(known) and known[index] is EXAMPLES and x.shape[:1] == (examples,):  # of most layers
        return EXAMPLES
    layout = known[index] if index < len(known) else known[-1] if len(set(known)) == 1 else None
    return layout if layout is None or layout == CONSTANT else layout.fitted(x.shape, examples)


def _at_the_end(function: Callable[[], None]) -> None:
    """Call a function when the running backward pass has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # pyright: ignore[reportAttributeAccessIssue]
