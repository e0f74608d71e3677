"""The network linearised in its weights at the posterior mean: its outputs are Gaussian in closed form.

    f(x, w) ~ f(x, m) + J(x) (w - m),  J = df/dw at m
    outputs ~ N(f(x, m), S(x)),        S(x) = J(x) diag(1/p) J(x)^T

This is the predictive distribution for a Laplace approximation, whose curvature (Gauss-Newton, Fisher) is
that of this linear model. Weight samples in the network itself leave the region where the linearisation
holds, and underfit. Source: Immer et al. 2021 (arXiv 2008.08400).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayeslayers.checks import at_least_one
from bayeslayers.dtypes import at_least_float32
from bayeslayers.inputs import Batch, as_batch, leaves, on_rows, on_tensors, split
from bayeslayers.layers import BayesLinear
from bayeslayers.outputs import Output, TensorNetwork
from bayeslayers.sampling import Sampler, Site, evaluation_mode, sites_of
from bayeslayers.sampling.sharing import Shared
from bayeslayers.unwrap import unwrapped

_MATH_ATTENTION = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
_COVARIANCE_BYTES = 2**30  # of one example
_CHUNK_BYTES = 2**29  # of Jacobians at a time: those of ResNet-18 with 10 outputs, for one example


def linearised_moments(
    model: nn.Module, x: Batch | Mapping[str, Any], output: Output | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean `(n, c)` of the linearised network's outputs, and their covariance `(n, c, c)`.

    The covariance is between the outputs of one example; other shapes than `(n, c)` are flattened. The model
    runs in eval mode, and every module's mode is restored. The cost is c backward passes for each example;
    a posterior over the last layer alone costs one forward pass.

    Args:
        model: Model with Bayesian layers.
        x: Inputs, examples in dimension 0; moved to the model's device. A tensor, `Inputs`, or a mapping.
        output: Which part of what the model returns, as in `predict`.

    Raises:
        ValueError: If no layer is Bayesian, an example's covariance takes more than 1 GiB, or the network cannot be
            differentiated example by example.
        TypeError: If the model returns anything but one tensor.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = torch.nn.Sequential(bl.BayesLinear(4, 8), torch.nn.Tanh(), bl.BayesLinear(8, 3))
        >>> mean, covariance = bl.linearised_moments(net, torch.randn(5, 4))
        >>> mean.shape, covariance.shape
        (torch.Size([5, 3]), torch.Size([5, 3, 3]))
    """
    mean, spread = _moments(model, x, output)
    return mean, spread if spread.dim() == 3 else spread.diag_embed()


def linearised_outputs(
    model: nn.Module,
    x: Batch | Mapping[str, Any],
    num_samples: int,
    generator: torch.Generator | None = None,
    output: Output | None = None,
) -> Tensor:
    """Return samples `(s, n, c)` of the linearised network's outputs, independent between examples.

    Each is f(m) + L eps with standard normal eps and L L^T the covariance of `linearised_moments`.

    Args:
        model: Model with Bayesian layers.
        x: Inputs, as for `linearised_moments`.
        num_samples: Samples, >= 1; they cost little compared with the covariance.
        generator: Source of the samples, on the model's device; torch's default one if None.
        output: As for `linearised_moments`.

    Raises:
        ValueError: As for `linearised_moments`, or if `num_samples` < 1.
        TypeError: As for `linearised_moments`.
    """
    at_least_one("num_samples", num_samples)
    mean, spread = _moments(model, x, output)
    noise = torch.randn(num_samples, *spread.shape[:2], generator=generator, dtype=spread.dtype, device=spread.device)
    if spread.dim() == 3:
        deviation = torch.einsum("nij,snj->sni", _square_root(spread), noise)
    else:
        deviation = spread.sqrt() * noise
    return mean + deviation.to(mean.dtype).reshape(num_samples, *mean.shape)


def _square_root(covariance: Tensor) -> Tensor:
    """Return L with L L^T = covariance, which may be singular, for example with more outputs than weights."""
    values, vectors = torch.linalg.eigh(covariance)
    # No eigenvalue of J J^T is negative; only rounding can leave one slightly below 0.
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)


@torch.no_grad()
def _moments(model: nn.Module, x: Batch | Mapping[str, Any], output: Output | None) -> tuple[Tensor, Tensor]:
    """Return the outputs' mean, and their covariance `(n, c, c)`, or their variance `(n, c)` if independent."""
    if not isinstance(model, TensorNetwork):
        model = TensorNetwork(unwrapped(model), output)
    sites = sites_of(model)
    batch = as_batch(x)
    if batch is None:
        raise TypeError(f"x must be a tensor, bl.Inputs or a mapping of inputs, got {type(x).__name__}.")
    device = sites[0].mean.device
    batch = on_tensors(lambda part: part.to(device), batch)
    function = _OfNoise(model, sites)
    # Only this attention kernel has rules for vmap.
    with evaluation_mode(model), _MATH_ATTENTION.held():
        mean, variance = _of_head(function, sites, batch)
        if variance is not None:
            return mean, variance
        outputs, weights = mean[0].numel(), sum(zero.numel() for zero in function.zeros)
        if (size := outputs**2 * mean.element_size()) > _COVARIANCE_BYTES:
            raise ValueError(
                f"method 'linearised' must have a covariance of at most {_COVARIANCE_BYTES / 2**30:g} GiB an example, "
                f"got {size / 2**30:.3g} GiB for {outputs:,} outputs. Use method='sample'."
            )
        size = max(1, _CHUNK_BYTES // (outputs * weights * mean.element_size()))
        rows = max(1, _CHUNK_BYTES // (2 * weights * mean.element_size())) if size == 1 else outputs
        try:
            parts = [_each_covariance(function, piece, rows) for piece in split(batch, size)]
        except RuntimeError as error:  # a module that vmap does not support, or too little memory
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                "the network must be differentiable example by example for method 'linearised', which failed: "
                f"{type(error).__name__}: {reason} Use method='sample', or a posterior over the last layer, "
                "bl.laplace(..., layers=bl.last_layer)."
            ) from error
    return mean, torch.cat(parts)


class _OfNoise:
    """A network as a function of the noise z in its weights m + z / sqrt(p).

    Its Jacobian at z = 0 is J diag(p)^(-1/2), whose product with its transpose is the covariance.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self.model = model
        self.names = [site.name for site in sites]
        self.sampler = Sampler(sites, frozen=True)
        self.zeros = [torch.zeros_like(site.mean) for site in sites]

    def __call__(self, batch: Batch, noise: Sequence[Tensor]) -> Tensor:
        with self.sampler.draw(dict(zip(self.names, noise, strict=True))):
            return self.model(batch)

    def covariance(self, example: Batch, rows: int) -> Tensor:
        """Return the covariance of the outputs for a batch of one example.

        It comes from blocks of `rows` rows of the Jacobian.
        """
        output, pull = vjp(lambda *noise: self(example, noise).flatten(), *self.zeros)[:2]
        unit = torch.eye(len(output), dtype=output.dtype, device=output.device)

        def jacobian(block: Tensor) -> list[Tensor]:
            return [at_least_float32(grad).flatten(1) for grad in vmap(pull)(block)]

        def product(left: list[Tensor], right: list[Tensor]) -> Tensor:
            return torch.stack([a @ b.T for a, b in zip(left, right, strict=True)]).sum(0)

        blocks, products = unit.split(rows), []
        for block in blocks:
            left = jacobian(block)
            products.append(torch.cat([product(left, left if b is block else jacobian(b)) for b in blocks], 1))
        return torch.cat(products)


def _each_covariance(function: _OfNoise, batch: Batch, rows: int) -> Tensor:
    """Return the covariance for each example of a batch, as a batch of its own."""
    tensors = [x for x in leaves(batch) if x.dim()]

    def covariance(*example: Tensor) -> Tensor:
        own = iter(example)
        return function.covariance(on_rows(lambda _: next(own).unsqueeze(0), batch), rows)

    return vmap(covariance)(*tensors)


def _of_head(function: _OfNoise, sites: Sequence[Site], batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the outputs, and their variance if they come from one linear layer that alone is uncertain.

    No two outputs then share a weight, so they are independent, and no Jacobian is needed:
    v_o = sum_i a_i^2 / p_oi + 1 / p_o for the layer's input a.
    """
    layer, inputs = sites[0].module, []
    if (
        type(layer) is not BayesLinear
        or layer.correlations
        or any(site.module is not layer or len(site.places) > 1 for site in sites)
    ):
        return function(batch, function.zeros), None
    thread = threading.get_ident()  # others may call the model

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            inputs.append(arguments[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        output = function(batch, function.zeros)
    finally:
        handle.remove()
    # The layer's first input is deterministic. The check ensures that nothing follows the layer, in place or by a hook.
    if not inputs or inputs[0].dim() != 2 or not torch.equal(F.linear(inputs[0], layer.weight, layer.bias), output):
        return output, None
    variances = {site.key: 1 / at_least_float32(site.precision) for site in sites}
    variance = at_least_float32(inputs[0]).square() @ variances["weight"].T
    return output, variance + variances["bias"] if layer.bias is not None else variance
