"""The dense curvature of one layer: the sum over examples of outer products of gradients in all of its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayeslayers.curvature.accumulate import chunks
from bayeslayers.dtypes import at_least_float32, full_precision


def outer_products(rule: Any, use: Any, g: Tensor) -> Sequence[Tensor | None]:
    """Return the gradients of the inputs, those of the tensors, and the sum over examples of v v^T.

    Here v is the gradient of one example in all entries of the op's tensors, one after the other.

    Args:
        rule: The op's `CurvatureRule`.
        use: The `Use` of the op.
        g: Gradient of the output.

    Returns:
        One value for each of `use.needs`.
    """
    first, tensors = len(use.inputs), [x for x in use.tensors if x is not None]
    asked = use._replace(needs=use.needs[:first] + (True,) * (2 * len(use.tensors)))
    entries = sum(x.numel() for x in tensors)
    with full_precision(g.device.type):
        of_inputs = rule.input_gradients(use, g)
        sums = [torch.zeros_like(at_least_float32(x)) for x in tensors]
        total = at_least_float32(g.new_zeros(entries, entries))
        for chunk in chunks(len(g), entries, g):
            rows = rule.per_example(asked._replace(inputs=tuple([x[chunk] for x in use.inputs])), g[chunk])
            found = [at_least_float32(x) for x in rows if x is not None]
            sums = [old + x.sum(0) for old, x in zip(sums, found, strict=True)]
            flat = torch.cat([x.flatten(1) for x in found], 1)
            total.addmm_(flat.mT, flat)
    own = iter(sums)
    return (*of_inputs, *(None if x is None else next(own).to(x.dtype) for x in use.tensors), total)
