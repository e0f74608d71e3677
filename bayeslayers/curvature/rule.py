"""What a curvature rule is: one object per kind of op, and the autograd function in which all rules run."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import Leaves, chunks, sum_of_squares
from bayeslayers.curvature.layout import CONSTANT, Layout
from bayeslayers.curvature.lifted import Lifted
from bayeslayers.curvature.op import Backward, EagerOp, Op, Plan, Tensors, Use, is_eager
from bayeslayers.curvature.refusal import Origin
from bayeslayers.dtypes import at_least_float32, autocast_operand, full_precision

if TYPE_CHECKING:
    from torch import nn


class CurvatureRule(abc.ABC):
    """The curvature of one kind of op: one object that all layers of that kind name as their `rule`.

    A rule names its tensors and computes its op. `per_example` and `squares` follow from the op by autograd, for any op
    that treats all examples alike; a rule overrides them where it knows a faster form.

    `squares` is a function of one use and the gradient of its output, and `per_example` is additive over uses: the
    per-example gradient of a layer that runs several times is the sum over its runs, before it is squared.

    Attributes:
        tensors: Names of the parameters that the op takes, in the order in which `forward` gets them.
        casts: Whether autocast applies to the op.
        kernels: By type of device ("cuda"), what computes there in place of `squares`; see `curvature.kernels`.
    """

    tensors: ClassVar[tuple[str, ...]]
    casts: ClassVar[bool] = True

    def __init__(self) -> None:
        self.kernels: dict[str, Backward] = {}

    @abc.abstractmethod
    def forward(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Any) -> Tensor:
        """Return the op's output.

        Args:
            inputs: As the layer gets them, with the examples in dimension 0.
            tensors: Values of the parameters, in the order of the rule's `tensors`; None for an absent one.
            settings: What the op takes besides.
        """

    def has_examples(self, inputs: tuple[Tensor, ...], tensors: Tensors) -> bool:
        """Return whether the inputs have the dimension of the examples; a single example may come without.

        Args:
            inputs: As for `forward`.
            tensors: Likewise.
        """
        return True

    def example_dims(self, inputs: tuple[Tensor, ...], tensors: Tensors, settings: Any) -> Iterable[int]:
        """Return the dimensions of the inputs in which the examples may be, alone or folded with others.

        Args:
            inputs: As for `forward`.
            tensors: Likewise.
            settings: Likewise.
        """
        return (0,)

    def lifted_settings(self, settings: Any) -> Any:
        """Return the settings of the op for inputs that have one dimension more, of examples, in front of theirs.

        `NotImplemented` if the op takes no such inputs; then the two first dimensions are folded.

        Args:
            settings: Of the op without it.
        """
        return NotImplemented

    def as_positions(self, use: Use, g: Tensor, layout: Layout, examples: int) -> tuple[Use, Tensor] | None:
        """Return a use with the examples in dimension 0 and all positions in dimension 1, so that uses can be joined.

        None if the op has no such form; then its uses are added by `per_example`.

        Args:
            use: The use.
            g: Gradient of the output.
            layout: Where the examples are in the inputs and the output.
            examples: How many there are.
        """
        return None

    def per_example(self, use: Use, g: Tensor) -> Tensors:
        """Return the per-example gradients `(n, *shape)` of the tensors, in their order.

        Those that `use.needs` does not ask for may be None. This one runs the op on each example by itself, by `vmap`.

        Args:
            use: The use of the op.
            g: Gradient of the output.
        """
        count = len(self.tensors)
        wanted = [i for i, tensor in enumerate(use.tensors) if tensor is not None and _needed(use, i, count)]

        def gradients(g_row: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
            def op(*own: Tensor) -> Tensor:
                tensors = list(use.tensors)
                for i, value in zip(wanted, own, strict=True):
                    tensors[i] = value
                return self.forward(tuple(x[None] for x in row), tuple(tensors), use.settings)[0]

            return torch.func.vjp(op, *[use.tensors[i] for i in wanted])[1](g_row)

        found = dict(zip(wanted, torch.func.vmap(gradients)(g, *use.inputs), strict=True)) if wanted else {}
        return tuple(found.get(i) for i in range(count))

    def squares(self, use: Use, g: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs, those of the tensors, and sums over examples of squared gradients.

        This one squares what `per_example` returns, in chunks of examples.

        Args:
            use: The use of the op.
            g: Gradient of the output.

        Returns:
            One value for each of `use.needs`; what is not needed may be None.
        """
        count = len(self.tensors)
        with full_precision(g.device.type):
            grads = {i: torch.zeros_like(x) for i, x in enumerate(use.tensors) if x is not None}
            sums = {i: torch.zeros_like(at_least_float32(x)) for i, x in grads.items()}
            elements = sum(x.numel() for x in grads.values())
            for chunk in chunks(len(g), elements, g) if any(use.needs[-2 * count :]) else ():
                rows = self.per_example(use._replace(inputs=tuple(x[chunk] for x in use.inputs)), g[chunk])
                for i, per_example in enumerate(rows):
                    if per_example is not None:
                        grads[i] = grads[i] + per_example.sum(0)
                        sums[i] = sums[i] + sum_of_squares(per_example)
            of_inputs = self.input_gradients(use, g)
        return (*of_inputs, *(grads.get(i) for i in range(count)), *(sums.get(i) for i in range(count)))

    def kernel_for(self, device: str) -> Backward:
        """Return what computes the squares on a type of device: a kernel registered for it, or else `squares`.

        Args:
            device: Type of device, as "cuda".
        """
        return self.kernels.get(device, self.squares)

    def input_gradients(self, use: Use, g: Tensor) -> list[Tensor | None]:
        """Return the gradients of the inputs, None for one that is not needed.

        Args:
            use: The use of the op.
            g: Gradient of the output.
        """
        wanted = [i for i in range(len(use.inputs)) if use.needs[i]]

        def op(*own: Tensor) -> Tensor:
            inputs = list(use.inputs)
            for i, value in zip(wanted, own, strict=True):
                inputs[i] = value
            return self.forward(tuple(inputs), use.tensors, use.settings)

        found = torch.func.vjp(op, *[use.inputs[i] for i in wanted])[1](g) if wanted else ()
        grads: list[Tensor | None] = [None] * len(use.inputs)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        return grads

    def factor_sizes(self, layer: nn.Module) -> tuple[int, int] | None:
        """Return the sizes (i, o) of the Kronecker factors of a layer's curvature, None if it has no such form.

        Args:
            layer: Layer with this rule.
        """
        return None

    def __call__(
        self, inputs: tuple[Tensor, ...], tensors: Tensors, leaves: Leaves | None, settings: Any = ()
    ) -> Tensor:
        """Return the op's output, and let the leaves receive the curvature in a backward pass.

        Args:
            inputs: As for `forward`.
            tensors: Likewise.
            leaves: Where the curvature goes; None for nowhere. Those of absent tensors get none.
            settings: As for `forward`.
        """
        if leaves is None:
            return self.forward(inputs, tensors, settings)
        eager = is_eager()
        # A mode that sees each function, as `LossFunctions`, has nothing to see here; `Lifted` must stay what it is.
        with torch._C.DisableTorchFunction() if eager and type(inputs[0]) is not Lifted else nullcontext():
            return self._tracked(inputs, tensors, leaves, settings, eager)

    def _tracked(
        self, inputs: tuple[Tensor, ...], tensors: Tensors, leaves: Leaves, settings: Any, eager: bool
    ) -> Tensor:
        if self.casts and torch._C._is_any_autocast_enabled():
            inputs = tuple([autocast_operand(x) for x in inputs])
            tensors = tuple([None if x is None else autocast_operand(x) for x in tensors])
        if not self.has_examples(inputs, tensors):
            rows = tuple([x.unsqueeze(0) for x in inputs])
            return self._tracked(rows, tensors, leaves, settings, eager).squeeze(0)
        found, place = leaves.of(self.tensors, tensors), None
        if (watch := leaves.watch) is not None and (eager or not torch.compiler.is_compiling()):
            if watch.observed is not None:
                inputs = tuple([x.plain if isinstance(x, Lifted) else x for x in inputs])
                output = self.forward(inputs, tensors, settings)
                dims = tuple(self.example_dims(inputs, tensors, settings))
                return watch.observe(leaves.name, inputs[0], output, dims)
            if eager:
                place = watch.enter(leaves.name, inputs[0])
            if place is not None and place.layout == CONSTANT:
                inputs = tuple(
                    [x.rows if isinstance(x, Lifted) else x.expand(place.examples, *x.shape) for x in inputs]
                )
                lifted = self.lifted_settings(settings)
                folds, place = lifted is NotImplemented, place.lifted()
                if folds:
                    lifted, place = settings, place.lifted(inputs[0].shape[1])
                    inputs = tuple([x.flatten(0, 1) for x in inputs])
                plan = Plan(self, len(inputs), lifted, leaves.kind, leaves.part, leaves.passes, place)
                rows = EagerOp.apply(plan, *inputs, *tensors, *found, None)
                if folds:
                    rows = rows.unflatten(0, (place.examples, -1))
                return Lifted.of(rows, watch.meetings, Origin("the output of layer", leaves.name))
            if type(inputs[0]) is not Tensor or len(inputs) > 1:
                inputs = tuple([_of_examples(x, place, leaves.name) for x in inputs])
        plan = Plan(self, len(inputs), settings, leaves.kind, leaves.part, leaves.passes, place)
        tally = leaves.tally if place is None else None
        return (EagerOp if eager else Op).apply(plan, *inputs, *tensors, *found, tally)  # pyright: ignore


class FactoredRule(CurvatureRule):
    """A rule of an op whose curvature also has the form of Kronecker factors, see `curvature.kronecker`.

    Its tensors are the weight and the bias, which is the last column of their matrix.
    """

    tensors = ("weight", "bias")

    @abc.abstractmethod
    def factors(self, use: Use, g: Tensor, size: int) -> Sequence[Tensor | None]:
        """Return the gradients of the inputs, those of the tensors, and the sums over examples of A and G.

        Args:
            use: The use of the op.
            g: Gradient of the output.
            size: Rows of A: one more than a row of the weight has entries, where the bias is in it.

        Returns:
            One value for each of `use.needs`; what is not needed may be None.
        """


def rule_of(kind: type) -> CurvatureRule:
    """Return the curvature rule that a class of layers names, once it is known to be one.

    Args:
        kind: Class of layers, with the class attribute `rule`.

    Raises:
        TypeError: If it names none, or one whose `tensors` are no names.
    """
    rule = getattr(kind, "rule", None)
    if not isinstance(rule, CurvatureRule):
        raise TypeError(
            f"{kind.__name__}.rule must be a CurvatureRule, got {rule!r}. Name that of the layer's op in the class, as "
            "`rule = curvature.LINEAR`."
        )
    names: Any = getattr(rule, "tensors", None)
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        rules = "a tuple of the names of the op's parameters"
    elif len(set(names)) < len(names):
        rules = "names that differ"
    elif isinstance(rule, FactoredRule) and names != FactoredRule.tensors:
        rules = f"{FactoredRule.tensors} in a rule with Kronecker factors"
    else:
        return rule
    raise TypeError(f"{type(rule).__name__}.tensors must be {rules}, got {names!r}: rule of {kind.__name__}.")


def _of_examples(x: Tensor, place: Any, name: str) -> Tensor:
    """Return an input with a row for each example, which has them already where it is the same for all."""
    if not isinstance(x, Lifted):
        return x
    return x.spread(Layout(-1) if place is None else place.layout, f"the input of layer {name}")


def _needed(use: Use, i: int, count: int) -> bool:
    """Return whether the gradient or the squares of the tensor at a place are needed."""
    return use.needs[i - 2 * count] or use.needs[i - count]
