"""The permutations of permuted MNIST, the same on every machine and in every release."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

PIXELS, TASKS = 784, 10


def permutation(task: int) -> Tensor:
    """Return the permutation of the pixels of one task of permuted MNIST.

    Pixels are sorted by the SHA-256 hash of "permuted-mnist TASK PIXEL", which depends on no random number generator.

    Args:
        task: 0 to 9.

    Returns:
        Indices `(784,)` of the columns of `images.flatten(1)`.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> permutation(3)[:4]
        tensor([724, 674, 221, 395])
    """
    if task not in range(TASKS):
        raise ValueError(f"task must be from 0 to {TASKS - 1}, got {task}.")

    def key(pixel: int) -> bytes:
        return hashlib.sha256(f"permuted-mnist {task} {pixel}".encode()).digest()

    return torch.tensor(sorted(range(PIXELS), key=key))
