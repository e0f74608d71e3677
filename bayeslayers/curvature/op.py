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
    """An op whose backward pass returns its curvature, as the gradients of leaves that play no part in the forward.

    Its operands are a `Plan`, the inputs, the tensors, the leaves of their curvature, and the tally: None where a place
    counts.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(plan, *operands):
        first, end = plan.inputs, plan.inputs + len(plan.rule.tensors)
        return owned(plan.rule.forward(operands[:first], operands[first:end], plan.settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _remember(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx, g):
        plan, saved, needs = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:-1]
        first, end, place = plan.inputs, len(saved), plan.place
        if plan.passes is not None:
            gradients, curvature = plan.passes.gradients, plan.passes.curvature
            switches = [True] * first + [gradients] * (end - first) + [curvature] * (len(needs) - end)
            needs = tuple([need and on for need, on in zip(needs, switches, strict=True)])
        use = Use(saved[:first], saved[first:], plan.settings, needs, plan.part)
        sums = counts = None
        if place is None:
            counts = tally(len(g), ctx.recomputed_in)
        elif place.collects:
            sums = place.collect(plan.rule, use, g, ctx.leaves, ctx.size, ctx.recomputed_in)
        else:
            place.count(ctx.recomputed_in, len(g))
        if sums is None:
            found = _computed(use, g, plan, ctx.size)
        else:
            gradients = use._replace(needs=needs[:end] + (False,) * (len(needs) - end))
            found = (*_computed(gradients, g, plan, ctx.size)[:end], *sums)
        return (None, *[grad if need else None for grad, need in zip(found, needs, strict=True)], counts)


def _remember(ctx: Any, plan: Plan, operands: Sequence[Any]) -> None:
    """Keep what the backward pass computes with."""
    ctx.plan = plan
    ctx.recomputed_in = task = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
    ctx.size = 0 if plan.kind == "squares" else len(operands[-3 if plan.kind == "factors" else -2])
    end = plan.inputs + len(plan.rule.tensors)
    if plan.place is not None:
        ctx.leaves = operands[end:-1]
        if task != -1:  # a backward pass that runs the layer again, where the layer may collect its uses
            plan.place.watch.open_pass(task)
    ctx.save_for_backward(*operands[:end])


def _computed(use: Use, g: Tensor, plan: Plan, size: int) -> Sequence[Tensor | None]:
    """Return what a use needs, by its rule; the first Kronecker factor has that size."""
    rule = plan.rule
    if plan.kind == "squares":
        return (rule.kernel_for(g.device.type) if rule.kernels else rule.squares)(use, g)
    return outer_products(rule, use, g) if plan.kind == "block" else rule.factors(use, g, size)


class EagerOp(torch.autograd.Function):
    """`Op` where neither `vmap` nor a compiler looks on: torch then calls it in a quarter of the time."""

    @staticmethod
    def forward(ctx, plan, *operands):
        first, end = plan.inputs, plan.inputs + len(plan.rule.tensors)
        output = plan.rule.forward(operands[:first], operands[first:end], plan.settings)
        _remember(ctx, plan, operands)
        return owned(output) if output._is_view() else output

    backward = Op.backward  # pyright: ignore[reportAssignmentType]


def is_eager() -> bool:
    """Return whether neither `vmap` nor a compiler looks on."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is None
