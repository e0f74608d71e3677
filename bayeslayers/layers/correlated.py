"""The buffers of a layer whose weights are correlated, under its posterior or its prior, and what is drawn from them.

A matrix-variate Gaussian has two roots, and may have a scale between them (`distributions.matrix_gaussian`). A dense
one has a root R of the covariance of all entries of the layer, those of its tensors one after the other. Either way
the layer's precisions are those of each entry by itself.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from bayeslayers.distributions.matrix_gaussian import as_matrix, correlated
from bayeslayers.dtypes import at_least_float32

ROOTS = ("weight_input_root", "weight_output_root")
SCALE = "weight_root_scale"
DENSE_ROOT = "joint_root"
PRIOR_ROOTS = ("weight_prior_input_root", "weight_prior_output_root")
PRIOR_DENSE_ROOT = "prior_joint_root"
POSTERIOR_STRUCTURE = (*ROOTS, SCALE, DENSE_ROOT)
PRIOR_STRUCTURE = (*PRIOR_ROOTS, PRIOR_DENSE_ROOT)
STRUCTURE = (*POSTERIOR_STRUCTURE, *PRIOR_STRUCTURE)

LARGEST_BLOCK = 6000  # entries with a dense covariance: a root of 144 MB in float32

Shapes = dict[str, tuple[int, ...]]

Product = Callable[[Tensor], Tensor]
_products: ContextVar[Mapping[nn.Module, Product] | None] = ContextVar("bayeslayers_products", default=None)


@contextmanager
def multiplying(products: Mapping[nn.Module, Product]) -> Iterator[None]:
    """Let the calling thread multiply noise by layers' roots in another way inside the scope, one that takes less.

    Args:
        products: By layer with roots and no scale, what returns R_out E R_in^T.
    """
    token = _products.set(products)
    try:
        yield
    finally:
        _products.reset(token)


class Correlated(nn.Module, abc.ABC):
    """What a Bayesian layer has of posteriors and priors with correlations."""

    @abc.abstractmethod
    def factor_sizes(self) -> tuple[int, int] | None:
        """Return the sizes (i, o) of the Kronecker factors of the weight's curvature, None if it has no such form."""

    @property
    def correlations(self) -> dict[str, Tensor]:
        """The buffers of the posterior's correlations by name; none where it is diagonal."""
        return self._structure(POSTERIOR_STRUCTURE)

    @property
    def is_correlated(self) -> bool:
        """Whether the posterior has correlations."""
        return ROOTS[0] in self._buffers or DENSE_ROOT in self._buffers

    @property
    def prior_correlations(self) -> dict[str, Tensor]:
        """The buffers of the prior's correlations by name; none where it is diagonal."""
        return self._structure(PRIOR_STRUCTURE)

    def set_correlations(self, buffers: Mapping[str, Tensor]) -> None:
        """Give the layer the correlations of these buffers, in place of what it had of the posterior's."""
        self._set_structure(POSTERIOR_STRUCTURE, buffers)

    def set_prior_correlations(self, buffers: Mapping[str, Tensor]) -> None:
        """Give the prior the correlations of these buffers; its mean and the precisions of entries are set apart."""
        self._set_structure(PRIOR_STRUCTURE, buffers)

    @property
    def roots(self) -> tuple[Tensor, Tensor] | None:
        """The roots of a matrix-variate posterior, None where there is none."""
        return self._pair(ROOTS)

    @property
    def root_scale(self) -> Tensor | None:
        """The scale between the roots, `(o, i)`; None for a scale of 1."""
        return self._buffers.get(SCALE)

    @property
    def dense_root(self) -> Tensor | None:
        """The root of the covariance of all of the layer's entries, None where the posterior has none."""
        return self._buffers.get(DENSE_ROOT)

    @property
    def prior_roots(self) -> tuple[Tensor, Tensor] | None:
        """The roots of a matrix-variate prior, None where there is none."""
        return self._pair(PRIOR_ROOTS)

    @property
    def prior_dense_root(self) -> Tensor | None:
        """The root of the prior's covariance of all of the layer's entries, None where it has none."""
        return self._buffers.get(PRIOR_DENSE_ROOT)

    def set_roots(self, input_root: Tensor, output_root: Tensor, scale: Tensor | None = None) -> None:
        """Give the layer a matrix-variate posterior."""
        pairs = zip((*ROOTS, SCALE), (input_root, output_root, scale), strict=True)
        self.set_correlations({name: value for name, value in pairs if value is not None})

    def set_prior_roots(self, input_root: Tensor, output_root: Tensor) -> None:
        """Give the layer a matrix-variate prior; its mean and the precisions of its entries are set apart."""
        self.set_prior_correlations(dict(zip(PRIOR_ROOTS, (input_root, output_root), strict=True)))

    def drop_roots(self) -> None:
        """Leave the layer the diagonal posterior of its precisions."""
        self.set_correlations({})

    def drop_prior_roots(self) -> None:
        """Leave the layer the diagonal prior of its prior precisions."""
        self.set_prior_correlations({})

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the layer's parameters by name, in the order in which a dense root has their entries."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    def correlated_tensors(self) -> tuple[str, ...]:
        """Return the names of the tensors between which the posterior has correlations; none where it is diagonal."""
        if self.dense_root is not None:
            return tuple(self.own_tensors())
        if (roots := self.roots) is None:
            return ()
        joint = self._parameters.get("bias") is not None and len(roots[0]) > self.get_parameter("weight")[0].numel()
        return ("weight", "bias") if joint else ("weight",)

    def change(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a sample with correlations adds to the means, by name, given standard normal values by name.

        Tensors that are not correlated with others are left out.
        """
        if (root := self.dense_root) is not None:
            tensors = self.own_tensors()
            flat = torch.cat([noise[name].flatten() for name in tensors])
            parts = (root @ flat.to(root.dtype)).split([tensor.numel() for tensor in tensors.values()])
            pairs = zip(tensors.items(), parts, strict=True)
            return {name: part.view(tensor.shape).to(tensor.dtype) for (name, tensor), part in pairs}
        if (roots := self.roots) is None:
            return {}
        joint = [noise[name] for name in self.correlated_tensors()]
        weight, columns = self.get_parameter("weight"), joint[0][0].numel()
        product = (_products.get() or {}).get(self)
        matrix = as_matrix(*joint)
        found = correlated(matrix, *roots, self.root_scale) if product is None else product(matrix)
        changes = {"weight": found[:, :columns].reshape(weight.shape).to(weight.dtype)}
        return changes | ({"bias": found[:, columns].to(joint[1].dtype)} if len(joint) > 1 else {})

    def structure_shapes(self, prior: bool = False) -> list[Shapes]:
        """Return the sets of buffers, with their shapes, that the posterior's correlations may have, or the prior's."""
        names, dense = (PRIOR_ROOTS, PRIOR_DENSE_ROOT) if prior else (ROOTS, DENSE_ROOT)
        found: list[Shapes] = []
        if (sizes := self.factor_sizes()) is not None:
            i, o = sizes
            for n in [i + 1, i] if self._parameters.get("bias") is not None else [i]:
                found.append({names[0]: (n, n), names[1]: (o, o)})
                if not prior:
                    found.append({**found[-1], SCALE: (o, n)})
        entries = sum(tensor.numel() for tensor in self.own_tensors().values())
        return [*found, {dense: (entries, entries)}] if found else []

    def _fit_structure(self, state_dict: Mapping[str, object], prefix: str) -> None:
        """Make room for the correlations of a posterior and a prior to load, or none where they are diagonal."""
        for prior, names in ((False, POSTERIOR_STRUCTURE), (True, PRIOR_STRUCTURE)):
            values = {name: state_dict.get(prefix + name) for name in names}
            shapes = {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}
            if shapes in self.structure_shapes(prior):
                like = at_least_float32(next(iter(self.own_tensors().values())).detach()[:0])
                self._set_structure(names, {name: like.new_empty(shape) for name, shape in shapes.items()})
            elif not shapes and any(prefix + f"{name}_precision" in state_dict for name in self._parameters):
                self._set_structure(names, {})

    def _structure(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = {name: self._buffers.get(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _set_structure(self, names: tuple[str, ...], buffers: Mapping[str, Tensor]) -> None:
        for name in self._buffers.keys() & names:
            del self._buffers[name]
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def _pair(self, names: tuple[str, str]) -> tuple[Tensor, Tensor] | None:
        found = [self._buffers.get(name) for name in names]
        return None if found[0] is None or found[1] is None else (found[0], found[1])
