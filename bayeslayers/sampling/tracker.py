"""Scopes of curvature: `tracked(model)` sums squared per-example gradients, or their Kronecker factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]

from bayeslayers.curvature.accumulate import BLOCK, FACTORS, Kind, Leaves, Part, Passes
from bayeslayers.curvature.refusal import CurvatureRefusal
from bayeslayers.curvature.watch import ONE_CALL, Watch
from bayeslayers.dtypes import at_least_float32
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.scope import current, opened
from bayeslayers.sampling.ordinary import reading_draws
from bayeslayers.sampling.provenance import examples_of, find_layouts, storages_of
from bayeslayers.sampling.units import groups_of, layers_of, parameter_names, reads_of


def tracked(model: nn.Module) -> AbstractContextManager[Tracker]:
    """Let backward passes inside the scope sum squared per-example gradients, in the yielded `Tracker`.

    Frozen parameters (`requires_grad=False`) are left out.
    """
    return Tracker(layers_of(model), model=model).track()


class Tracker:
    """Sums of squared per-example gradients of some layers, one scope after the other.

    Args:
        layers: Bayesian layers, and modules that read uncertain parameters themselves, by their names.
        kind: "squares" of all tensors; or for layers whose weight has Kronecker factors (`BayesianLayer.factor_sizes`)
            these "factors", in which a bias is that is not frozen, or the dense "block" of weight and bias, unless one
            is frozen.
        dense: Layers among those of "factors" that get the block instead.
        model: The model that they belong to, to see that the rows of their inputs are its examples.

    Attributes:
        leaves: Per parameter name, the leaf whose `.grad` is the sum of squares of the last scope,
            in the units of the loss that was back-propagated. Those of the factors of `NAME.weight`
            are `NAME.weight_input_factor` and `NAME.weight_output_factor`, that of a block is `NAME.block`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        kind: Kind = "squares",
        model: nn.Module | None = None,
        dense: Collection[nn.Module] = (),
    ):
        self.layers = {name: module for name, module in layers.items() if isinstance(module, BayesianLayer)}
        self._names, self._reads = parameter_names(layers), reads_of(layers)
        self._model, self._looks_left, self._looked = model, 3, False
        self._watch = Watch(groups_of(layers, self._reads), frozenset(self._reads), self._check)
        self.leaves: dict[str, Tensor] = {}
        self._tallies: dict[str, Tensor] = {}
        self._tallied: set[str] = set()  # names of those that a backward pass has reached
        self._part: Part | None = None
        self._kind: Kind = kind
        self._dense = dense
        self._switches = Passes()
        self._kinds: list[Any] = []  # of the parameters in the last scope that tracked squares
        self._own_leaves: dict[nn.Module, Leaves] = {}  # in that scope
        self._seen: dict[int, tuple[str, int]] = {}  # per backward pass, a layer and how many examples it saw
        self._uses: dict[tuple[str, int], int] = {}  # per layer and backward pass

    @property
    def examples(self) -> int:
        """Examples that went backward in the last scope, over all its backward passes."""
        counted = Counter(self._watch.counted)
        tallies = {key: self._tallies[key].grad for key in self._tallied}
        counted.update({key: int(tally[0]) for key, tally in tallies.items() if tally is not None})
        return max(counted.values(), default=0)

    def clear(self) -> None:
        """Forget the sums."""
        for leaf in (*self.leaves.values(), *[self._tallies[key] for key in self._tallied]):
            leaf.grad = None
        self._tallied.clear()
        self._seen.clear()
        self._uses.clear()
        self._watch.clear()

    @contextmanager
    def track(
        self,
        fraction: float = 1.0,
        generator: torch.Generator | None = None,
        place: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> Iterator[Tracker]:
        """Sum squared per-example gradients inside the scope, from zero.

        Args:
            fraction: Part of each batch, in (0, 1], from which the sums of linear and convolution
                weights are estimated.
            generator: Source of that part.
            place: Where the examples are in a larger batch, as for `Part`.
        """
        self.clear()
        self._part = None
        self._switches.gradients = self._switches.curvature = True
        if fraction < 1:
            device = None if generator is None else generator.device
            self._part = Part(fraction, float(torch.rand((), generator=generator, device=device)), place)
        outer = current()
        leaves = self._leaves_of_layers()
        reads: dict[nn.Module, dict[str, Leaves]] = {}
        for name, (module, key) in self._reads.items():
            reads.setdefault(module, {})[key] = self._leaves_of_read(name, module._parameters[key])
        scope = replace(outer, leaves={**outer.leaves, **leaves}, reads={**outer.reads, **reads})
        with reading_draws(reads), opened(scope), self._watching():
            yield self

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Know in the scope when the model is called as a whole, and look at the first such call."""
        if self._model is None:
            yield
            return
        hooks = [
            self._model.register_forward_pre_hook(self._open, with_kwargs=True),
            self._model.register_forward_hook(self._close),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _open(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if peek_interpreter_stack() is not None or (examples := examples_of(args, kwargs)) == 0:  # under vmap
            return
        if self._reads:
            self._watch.meetings.constants = storages_of(model)
        if not self._looked and self._looks_left:
            self._looks_left -= 1
            self._looked = find_layouts(model, self._watch, args, kwargs)
        self._watch.open_call(examples)

    def _close(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._watch.close_call()

    def sums_of(self, loss: Tensor) -> tuple[dict[str, Tensor], int]:
        """Return the sums that a loss gives, by the leaves' names, and the number of its examples.

        The graph stays for the backward pass of another loss, the parameters' gradients are left
        alone, and that pass spends no time on factors.
        """
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        self._switches.gradients, self._switches.curvature = False, True
        self._watch.close_call()  # the model has returned: what checkpointing runs again is in no call
        counted, self._watch.counted, self._watch.captured = self._watch.counted, Counter(), {}
        try:
            grads = torch.autograd.grad(
                loss, [*leaves.values(), *self._tallies.values()], retain_graph=True, allow_unused=True
            )
            found, seen = self._watch.captured, self._watch.counted
        finally:
            self._switches.gradients, self._switches.curvature = True, False
            self._watch.counted, self._watch.captured = counted, None
        tallies = zip(self._tallies, grads[len(leaves) :], strict=True)
        seen.update({key: int(tally[0]) for key, tally in tallies if tally is not None})
        sums = {name: grad for name, grad in zip(leaves, grads, strict=False) if grad is not None}
        sums |= {name: found[id(leaf)] for name, leaf in leaves.items() if id(leaf) in found}
        return sums, max(seen.values(), default=0)

    def _leaves_of_layers(self) -> dict[nn.Module, Leaves]:
        """Return the leaves of each layer: those of the last scope, where the parameters are still of that kind."""
        if self._part is not None or self._kind != "squares":
            return {layer: self._leaves_of(name, layer) for name, layer in self.layers.items()}
        parameters = [p for layer in self.layers.values() for p in layer._parameters.values() if p is not None]
        kinds = [[id(p) for p in parameters], [p.requires_grad for p in parameters], [p.dtype for p in parameters]]
        kinds += [[p.device for p in parameters], [p.shape for p in parameters]]  # lists: a tuple for each takes longer
        if kinds != self._kinds:
            self._own_leaves = {layer: self._leaves_of(name, layer) for name, layer in self.layers.items()}
            self._kinds = kinds
        return self._own_leaves

    def _leaves_of(self, name: str, layer: BayesianLayer) -> Leaves:
        """Return the leaves of one layer; its frozen parameters have none."""
        prefix = f"{name}." if name else ""
        kind: Kind = "block" if layer in self._dense else self._kind
        structured = {"factors": self._factors_of, "block": self._block_of}.get(kind)
        if structured is not None and (leaves := structured(prefix, layer)) is not None:
            tally = self._tally(name)
            return Leaves(leaves, tally, kind, passes=self._switches, name=name, watch=self._watch)
        ops = {}
        for op, (rule, names) in layer.ops(layer).items():
            own = prefix + op if op else name
            squares = {
                key: self._leaf(prefix + parameter, layer._parameters.get(parameter))
                for key, parameter in zip(rule.tensors, names, strict=True)
            }
            found = {key: leaf for key, leaf in squares.items() if leaf is not None}
            tally = self._tally(own)
            ops[op] = Leaves(found, tally, part=self._part, name=own, watch=self._watch)
        return next(iter(ops.values()))._replace(ops=ops)

    def _leaves_of_read(self, name: str, parameter: nn.Parameter | None) -> Leaves:
        """Return the leaves of a parameter that is read as an attribute."""
        leaf = self._leaf(name, parameter)
        found = {} if leaf is None else {"value": leaf}
        return Leaves(found, self._tally(name), name=name, watch=self._watch)

    def _tally(self, key: str) -> Tensor:
        """Return the tally of a layer or a read, which counts where the place of a use is not known."""
        if key not in self._tallies:
            tally = self._tallies[key] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            tally.register_hook(partial(self._check_tally, key))
        return self._tallies[key]

    def _factors_of(self, prefix: str, layer: BayesianLayer) -> dict[str, Tensor] | None:
        """Return the leaves of a layer's Kronecker factors, None if it has none or its matrix is frozen."""
        if (sizes := layer.factor_sizes()) is None or prefix[:-1] in self._watch.groups:
            return None
        matrix, column = (layer._parameters.get(key) for key in layer.rule.tensors)
        if matrix is None or not matrix.requires_grad:
            return None
        joint = column is not None and column.requires_grad
        like = matrix.detach()[:0].to(torch.promote_types(matrix.dtype, torch.float32))
        return {
            key: self._zeros(f"{prefix}{layer.rule.tensors[0]}_{key}_factor", like, torch.Size((size, size)))
            for key, size in zip(FACTORS, (sizes[0] + joint, sizes[1]), strict=True)
        }

    def _block_of(self, prefix: str, layer: BayesianLayer) -> dict[str, Tensor] | None:
        """Return the leaf of a layer's dense curvature, None if it has none or a tensor is frozen."""
        tensors = [x for x in layer._parameters.values() if x is not None]
        if layer.factor_sizes() is None or not all(x.requires_grad for x in tensors):
            return None
        entries, like = sum(x.numel() for x in tensors), at_least_float32(tensors[0].detach()[:0])
        return {BLOCK: self._zeros(prefix + BLOCK, like, torch.Size((entries, entries)))}

    def _leaf(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """Return a leaf with the parameter's shape, None if that is absent or frozen; tied ones have one."""
        name = self._names.get(parameter, name)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if parameter is None or not parameter.requires_grad:
            self.leaves.pop(name, None)
            return None
        return self._zeros(name, parameter, parameter.shape)

    def _zeros(self, name: str, like: Tensor, shape: torch.Size) -> Tensor:
        """Return a leaf with no memory of its own, the last one if it still fits."""
        leaf = self.leaves.get(name)
        if leaf is None or (leaf.device, leaf.dtype, leaf.shape) != (like.device, like.dtype, shape):
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            leaf = self.leaves[name] = zero.expand(shape).requires_grad_()
        return leaf

    def _check_tally(self, name: str, tally: Tensor | None) -> None:
        if tally is not None:  # a use whose place is known, or a further one in the pass, adds none
            self._tallied.add(name)
            examples, uses, recomputed_in = (int(x) for x in tally.tolist())
            task = torch._C._current_graph_task_id() if recomputed_in == -1 else recomputed_in
            if self._watch.must_collect(name) and (task, name) not in self._watch.collected:
                uses = 2
            self._check(name, examples, uses, task)

    def _check(self, name: str, examples: int, uses: int, task: int) -> None:
        """Refuse a backward pass whose per-example gradients are not those of one batch of examples.

        A reentrant checkpoint runs a backward pass of its own inside the outer one, to which its
        uses belong: it is the pass in which the forward was recomputed.
        """
        uses = self._uses[name, task] = self._uses.get((name, task), 0) + uses
        if uses > 1:
            raise CurvatureRefusal(self._shown(name), f"layer '{self._shown(name)}' {ONE_CALL}")
        first, expected = self._seen.setdefault(task, (name, examples))
        if examples != expected:
            if self._watch.sizes == {examples}:  # the other layer is the one to name
                name, examples, first, expected = first, expected, name, examples
            raise CurvatureRefusal(
                self._shown(name),
                f"dimension 0 of the input of layer '{self._shown(name)}' must run over the examples, got {examples} "
                f"there and {expected} in layer '{self._shown(first)}'. Keep examples in dimension 0 (a linear layer "
                "takes (n, *, features)), or exclude the layer from the Bayesian ones.",
            )

    def _shown(self, name: str) -> str:
        """Return the name of a layer or a read in messages: of the model itself its class."""
        return name or type(self.layers[""]).__name__
