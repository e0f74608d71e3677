"""Kronecker factors of the curvature of linear layers and convolutions: A of the input, G of the output's gradient.

With the input x~ of a layer (a patch, for a convolution; a 1 behind it for the bias) and the gradient
g of its output at position p of example n, the gradient of the matrix [weight | bias] is the sum over
p of g x~^T, and the mean over examples of its outer product is taken to be A (x) G with

    A = mean_n sum_p x~_np x~_np^T,    G = mean_n 1/P sum_p g_np g_np^T

Of a single position (P = 1) this takes A and G for independent; of several also the gradients at
different positions for uncorrelated, and the sums of products for products of sums.
Source: Martens & Grosse 2015 (arXiv 1503.05671), Eq. 1; Grosse & Martens 2016 (arXiv 1602.01407),
Theorem 1, of which these are Omega and Gamma; Eschenhagen et al. 2023 (arXiv 2311.00636), K-FAC-expand,
for the positions of a linear layer.

As for the squares, two leaves receive the sums over examples of A and G, in the units of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_products(columns: Tensor, size: int) -> Tensor:
    """Return the sum of the outer products of columns, with a 1 behind each if `size` is i + 1.

    Args:
        columns: `(i, m)`.
        size: i or i + 1.
    """
    product = columns @ columns.t()
    if len(columns) == size:
        return product
    total = columns.sum(1, keepdim=True)
    ones = total.new_full((1, 1), columns.shape[1])
    return torch.cat([torch.cat([product, total], 1), torch.cat([total.t(), ones], 1)])
