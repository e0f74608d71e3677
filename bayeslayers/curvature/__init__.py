"""Sums of squared per-example gradients, computed by autograd as the gradient of a leaf of their own.

A `CurvatureRule` is one object for each kind of op: it names the op's parameters, computes its output, its squares and,
where it has them, its Kronecker factors. All rules run in one `torch.autograd.Function`, which takes an op's operands
and one extra leaf per parameter. The leaf plays no part in the forward; the backward returns as its "gradient" the sum
over examples of the squared per-example gradients, in the units of the loss that was back-propagated. So autograd adds
up several backward passes, and no hook keeps inputs alive.

Dimension 0 of every operand runs over examples, or a `Layout` says where they are. Modules that run several times in
one call of the model add their uses up before squaring (`uses`). A further leaf, the tally, receives
`[examples, 1, backward pass]` per use of the op: that is how a module used in two calls, or one that sees another
number of examples than its neighbours, is found out instead of giving a wrong number.
"""

from bayeslayers.curvature.affine import AFFINE
from bayeslayers.curvature.conv import CONVOLUTION
from bayeslayers.curvature.embedding import EMBEDDING
from bayeslayers.curvature.kernels import register_kernel
from bayeslayers.curvature.kernels.squares import convolution_squares, linear_squares
from bayeslayers.curvature.linear import LINEAR
from bayeslayers.curvature.rule import CurvatureRule, FactoredRule, Use

register_kernel(LINEAR, "cuda", linear_squares)
register_kernel(CONVOLUTION, "cuda", convolution_squares)

__all__ = ["AFFINE", "CONVOLUTION", "EMBEDDING", "LINEAR", "CurvatureRule", "FactoredRule", "Use"]
