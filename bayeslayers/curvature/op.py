"""The autograd function in which all curvature rules run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]

from bayeslayers.curvature.accumulate import Kind, Part, Passes, owned, tally
from bayeslayers.curvature.block import outer_products

Tensors: TypeAlias = tuple[Tensor | None, ...]


class Use(NamedTuple):
    """One use of an op, as its backward pass finds it.

    Attributes:
        inputs: The op's inputs, with the examples in dimension 0.
        tensors: Its parameters, in the order of the rule's `tensors`; None for an absent one.
        settings: What the op takes besides, as a convolution's stride.
        needs: What is asked for: a flag for the gradient of each input, that of each tensor, and each sum of curvature.
        part: The part of the batch that sums of squares may be estimated from; None for all of it.
    """

    inputs: tuple[Tensor, ...]
    tensors: Tensors
    settings: Any
    needs: tuple[bool, ...]
    part: Part | None = None


Backward: TypeAlias = Callable[[Use, Tensor], Sequence[Tensor | None]]


class Plan(NamedTuple):
    """What the function takes beside the op's operands.

    Attributes:
        rule: The op's `CurvatureRule`.
        inputs: Number of its inputs; the other operands are the tensors and the leaves.
        settings: As the rule takes them.
        kind: What the leaves receive.
        part: As in `Leaves`.
        passes: Likewise.
        place: A `Place`, which knows where the examples are and adds up several uses; None where dimension 0 runs over
            the examples and the layer is used once.
    """

    rule: Any
    inputs: int
    settings: Any
    kind: Kind
    part: Part | None
    passes: Passes | None
    place: Any


class Op(torch.autograd.Function):
    """An op whose backward pass returns its curvature, as the gradients of leaves that play no part in the forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan, *operands):
        first, end = plan.inputs, plan.inputs + len(plan.rule.tensors)
        return owned(plan.rule.forward(operands[:first], operands[first:end], plan.settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, *operands = inputs
        ctx.recomputed_in = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        first_leaf = {"squares": None, "factors": -3, "block": -2}[ctx.plan.kind]
        ctx.size = 0 if first_leaf is None else len(operands[first_leaf])
        end = ctx.plan.inputs + len(ctx.plan.rule.tensors)
        if ctx.plan.place is not None:
            ctx.leaves = operands[end:-1]
            ctx.plan.place.recomputed_in(ctx.recomputed_in)
        ctx.save_for_backward(*operands[:end])

    @staticmethod
    def backward(ctx, g):
        plan, saved, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:-1]
        rule, first = plan.rule, plan.inputs
        middle = len(saved) - first
        if plan.passes is not None:
            gradients, curvature = plan.passes.gradients, plan.passes.curvature
            switches = [True] * first + [gradients] * middle + [curvature] * (len(needs) - first - middle)
            needs = tuple([need and on for need, on in zip(needs, switches, strict=True)])
        use = Use(saved[:first], saved[first:], plan.settings, needs, plan.part)

        def compute(use: Use) -> Sequence[Tensor | None]:
            if plan.kind == "squares":
                return (rule.kernel_for(g.device.type) if rule.kernels else rule.squares)(use, g)
            if plan.kind == "block":
                return outer_products(rule, use, g)
            return rule.factors(use, g, ctx.size)

        place, counts = plan.place, None
        if place is None:
            found, counts = compute(use), tally(len(g), ctx.recomputed_in)
        elif not place.collects:
            found = compute(use)
            place.count(ctx.recomputed_in, len(g))
        else:
            end = first + middle
            gradients = compute(use._replace(needs=needs[:end] + (False,) * (len(needs) - end)))
            sums = place.collect(rule, use, g, ctx.leaves, ctx.size, ctx.recomputed_in)
            found = (*gradients[:end], *sums)
        grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (None, *grads, counts)


class EagerOp(torch.autograd.Function):
    """`Op` where neither `vmap` nor a compiler looks on: torch then calls it in a quarter of the time."""

    @staticmethod
    def forward(ctx, plan, *operands):
        first, end = plan.inputs, plan.inputs + len(plan.rule.tensors)
        output = plan.rule.forward(operands[:first], operands[first:end], plan.settings)
        output = owned(output) if output._is_view() else output
        Op.setup_context(ctx, (plan, *operands), output)
        return output

    backward = Op.backward  # pyright: ignore[reportAssignmentType]


def is_eager() -> bool:
    """Return whether neither `vmap` nor a compiler looks on."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is None


def apply(plan: Plan, *operands: Tensor | None) -> Any:
    """Return an op's output.

    Args:
        plan: What it takes beside its operands.
        *operands: Its inputs, its tensors, the leaves of their curvature, and the tally.
    """
    if not is_eager():
        return Op.apply(plan, *operands)
    with torch._C.DisableTorchFunction():  # a mode that sees each function, as `LossFunctions`, has nothing to see here
        return EagerOp.apply(plan, *operands)
