"""Kernels that compute on one type of device what torch ops compute in several passes.

A kernel for a rule's squares has the signature of `CurvatureRule.squares` and must give its values. `register_kernel`
makes the rule use it; all layers of the rule follow.

Kernels sample large tensors (`draw`) and make the natural-gradient step (`step`), on a CPU by Numba and on a GPU by
Triton. On a GPU they compute the squares of linear layers and convolutions too (`squares`). `use_numba(False)` and
`use_triton(False)` turn them off. Only the modules `numba_*` and `triton_*` import these languages, when a kernel first
runs.
"""

from __future__ import annotations

import torch

from bayeslayers.curvature.kernels.launch import use_numba, use_triton
from bayeslayers.curvature.rule import Backward, CurvatureRule

__all__ = ["register_kernel", "use_numba", "use_triton"]


def register_kernel(rule: CurvatureRule, device: str, kernel: Backward) -> None:
    """Let a rule compute its squares by a kernel, on one type of device.

    Args:
        rule: The rule, as `curvature.LINEAR`.
        device: Type of device, as "cuda".
        kernel: Takes a `Use` and the gradient of its output, returns what `CurvatureRule.squares` does.

    Raises:
        TypeError: If the rule is none, or the kernel is no function.
        ValueError: If torch knows no such type of device.
    """
    if not isinstance(rule, CurvatureRule):
        raise TypeError(f"rule must be a CurvatureRule, got {rule!r}.")
    if not callable(kernel):
        raise TypeError(f"kernel must be a function of a use and a gradient, got {kernel!r}.")
    try:
        known = torch.device(device)
    except RuntimeError:
        known = None
    if known is None or known.index is not None:
        raise ValueError(f"device must be a type of device, as 'cuda', got {device!r}.")
    rule.kernels[known.type] = kernel
