"""What every Bayesian layer shares: its parameters are the means, precisions and priors are buffers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from bayeslayers.checks import positive
from bayeslayers.curvature.accumulate import Leaves
from bayeslayers.curvature.rule import CurvatureRule, rule_of
from bayeslayers.layers.correlated import STRUCTURE, Correlated
from bayeslayers.layers.perturbation import Perturbation
from bayeslayers.layers.scope import NOTHING, OUTSIDE, scope_for

DEFAULT_PRIOR_PRECISION = 50.0  # a standard deviation of 0.14, the usual initial one of a unit with 50 inputs
DEFAULT_INIT_PRECISION = 1e3  # a standard deviation of 0.03, small beside it

POSTERIOR_SUFFIXES = ("_precision", "_prior_mean", "_prior_precision")
HALF_PRECISIONS = (torch.float16, torch.bfloat16)

Ops: TypeAlias = Mapping[str, tuple[CurvatureRule, Sequence[str]]]


def attach_posterior(
    module: nn.Module, prior_precision: float, init_precision: float, keys: Iterable[str] | None = None
) -> None:
    """Give parameters of any module, not those of modules inside it, a precision and a prior, as new buffers.

    The prior's mean is 0, and 1 for the scale of a Bayesian normalisation layer.

    Args:
        module: Module that owns the parameters.
        prior_precision: Precision of the prior, > 0.
        init_precision: Precision of the posterior, > 0.
        keys: Names that the parameters have in the module; None for all of them.

    Raises:
        TypeError: If a parameter is not of real numbers.
    """
    means = module.prior_means if isinstance(module, BayesianLayer) else {}
    for key in [name for name, _ in module.named_parameters(recurse=False)] if keys is None else keys:
        parameter: Any = module._parameters[key]
        if not parameter.is_floating_point():
            raise TypeError(f"parameter '{key}' must be of real numbers, got {parameter.dtype}.")
        values = (init_precision, means.get(key, 0.0), prior_precision)
        dtype = torch.promote_types(parameter.dtype, torch.float32)  # half precision holds no precision above 65504
        for suffix, value, shape in zip(POSTERIOR_SUFFIXES, values, (parameter.shape, (), ()), strict=True):
            module.register_buffer(key + suffix, parameter.new_full(shape, value, dtype=dtype, requires_grad=False))


class BayesianLayer(Correlated):
    """What every Bayesian layer adds to its torch.nn layer: a precision and a prior per parameter.

    For a parameter `weight` (the posterior's mean) there are the buffers `weight_precision` (the
    shape of `weight`), `weight_prior_mean` and `weight_prior_precision` (scalars, or the shape of
    `weight` once a posterior has become a prior). An ordinary checkpoint, which has none of the
    three, loads as means and leaves them as they are.

    A layer may have a matrix-variate posterior, by two buffers more: `weight_input_root` and
    `weight_output_root`, from which its weight is drawn as in `matrix_gaussian`, jointly with the
    bias if the first is one larger than a row of the weight; `weight_root_scale` may come between them.
    Or it has a dense posterior, by `joint_root`, a root of the covariance of all of its entries. The
    precisions are then those of each entry by itself. Optimisers of a diagonal posterior go on from these
    and drop the roots. `posterior_to_prior` makes such a posterior a prior of its kind, by
    `weight_prior_input_root` and `weight_prior_output_root`, or `prior_joint_root`; the prior's precisions
    are then those of each entry by itself.

    Args:
        prior_precision: Precision of the prior N(prior_mean, 1/prior_precision), > 0.
        init_precision: Precision of the posterior at the start, > 0.

    Other arguments are those of the torch.nn layer.
    """

    rule: ClassVar[CurvatureRule]  # of the layer's op, whose tensors are the layer's parameters; see `ops` for several
    prior_means: ClassVar[Mapping[str, float]] = {}
    is_read = False  # another module's forward reads a tensor of the layer, without calling it
    shares = False  # another layer has a tensor of the layer too

    def __init__(
        self,
        *args: Any,
        prior_precision: float = DEFAULT_PRIOR_PRECISION,
        init_precision: float = DEFAULT_INIT_PRECISION,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        rule_of(type(self))
        positive("prior_precision", prior_precision)
        positive("init_precision", init_precision)
        self.attach_posterior(prior_precision, init_precision)

    @classmethod
    def ops(cls, layer: nn.Module) -> Ops:
        """Return the rule of each op of a layer, and the parameters that it takes in the order of the rule's tensors.

        A layer of one op, which is named "", computes by `compute`. One of several ops computes by `run` of each, at
        most once under each name in one forward. Ops may have parameters in common if the entries differ that get a
        gradient from each.

        Args:
            layer: A layer of this class, or an ordinary one that may become one.
        """
        return {"": (cls.rule, cls.rule.tensors)}

    @classmethod
    def covered(cls, layer: nn.Module) -> list[str]:
        """Return the names of the parameters of a layer, of this class or ordinary, for which there are rules.

        Args:
            layer: The layer.
        """
        return list(dict.fromkeys(name for _, names in cls.ops(layer).values() for name in names if name))

    def attach_posterior(self, prior_precision: float, init_precision: float) -> None:
        """Give each parameter that has none its precision and prior, as new buffers."""
        names = [name for name, _ in self.named_parameters(recurse=False) if f"{name}_precision" not in self._buffers]
        attach_posterior(self, prior_precision, init_precision, names)

    @property
    def drawn(self) -> Mapping[str, Tensor]:
        """The draws of the calling thread's scope, by their parameters' names; empty outside one."""
        return scope_for(self).drawn.get(self, NOTHING)

    @property
    def perturbation(self) -> Perturbation | None:
        """How the calling thread's scope draws the output, where it draws no weight."""
        return scope_for(self).perturbations.get(self)

    @property
    def leaves(self) -> Leaves | None:
        """Where the calling thread's scope puts the layer's curvature."""
        return scope_for(self).leaves.get(self)

    def value(self, name: str) -> Any:
        """Return the tensor to compute with: the scope's draw, the mean outside one, None if there is no such."""
        draw = self.drawn.get(name)
        return getattr(self, name) if draw is None else draw

    def operands(self) -> tuple[Any, Leaves | None, Perturbation | None]:
        """Return what a forward computes with, by one look at the scope.

        Returns:
            The tensors of the layer's rule in its order, the leaves to fill where a gradient may flow, and how the
            scope draws the output.
        """
        own, scope = self._parameters, scope_for(self)
        # As getattr, which costs three times as much: what a wrapper has made an attribute is not in `_parameters`.
        drawn = NOTHING if scope is OUTSIDE else scope.drawn.get(self, NOTHING)
        tensors = tuple(
            [
                drawn[name] if name in drawn else own[name] if name in own else getattr(self, name)
                for name in self.rule.tensors
            ]
        )
        if scope is OUTSIDE:
            return tensors, None, None
        tracks = torch.is_grad_enabled() or scope.observes
        return tensors, scope.leaves.get(self) if tracks else None, scope.perturbations.get(self)

    @property
    def tracking(self) -> Leaves | None:
        """Where a forward puts the layer's curvature, None where none is tracked or no gradient flows."""
        scope = scope_for(self)
        return scope.leaves.get(self) if torch.is_grad_enabled() or scope.observes else None

    def run(self, op: str, *inputs: Tensor, settings: Any = ()) -> Tensor:
        """Return the output of one of the layer's ops.

        Args:
            op: Its name, as in `ops`.
            *inputs: Its inputs, with the examples in dimension 0.
            settings: What the op's rule takes besides.
        """
        rule, names = self.ops(self)[op]
        tensors = tuple([self.value(name) if name in self._parameters else None for name in names])
        leaves = self.tracking
        return rule(inputs, tensors, None if leaves is None else leaves.ops[op], settings)

    def compute(self, *inputs: Tensor, settings: Any = ()) -> Tensor:
        """Return the output of the layer's rule, which is all that most layers' forward has to do.

        Args:
            *inputs: Inputs of the op, with the examples in dimension 0.
            settings: What the rule's op takes besides.
        """
        tensors, leaves, _ = self.operands()
        return self.rule(inputs, tensors, leaves, settings)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesianLayer:
        """Apply what moves and casts a module, as `half()`; the posterior's buffers stay in at least float32."""
        own = [key for key in self._buffers if key.endswith(POSTERIOR_SUFFIXES) or key in STRUCTURE]
        before = {key: self._buffers[key] for key in own}
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and new.dtype in HALF_PRECISIONS:
                self._buffers[key] = old.to(new.device, torch.promote_types(old.dtype, torch.float32))
        return self

    def factor_sizes(self) -> tuple[int, int] | None:
        """Return the sizes (i, o) of the Kronecker factors of the weight's curvature, None if it has no such form.

        A layer of several ops has none, nor has one that shares a tensor: its curvature is diagonal everywhere.
        """
        diagonal = self.shares or self.is_read or "" not in self.ops(self)
        return None if diagonal else self.rule.factor_sizes(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._fit_structure(state_dict, prefix)
        own = [name for name in self._buffers if name.endswith(POSTERIOR_SUFFIXES) or name in STRUCTURE]
        for name in own:
            self._fit_prior(name, state_dict.get(prefix + name))
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        if not any(prefix + name in state_dict for name in own):  # an ordinary checkpoint
            missing = [key for key in missing if key.removeprefix(prefix) not in own]
        missing_keys.extend(missing)

    def _fit_prior(self, name: str, loaded: object) -> None:
        """Give a prior's buffer the loaded shape, where that is a scalar or the parameter's."""
        if not isinstance(loaded, Tensor) or "_prior_" not in name or name in STRUCTURE:
            return
        buffer, parameter = self.get_buffer(name), self.get_parameter(name.partition("_prior_")[0])
        if loaded.shape != buffer.shape and loaded.shape in ((), parameter.shape):
            setattr(self, name, buffer.new_empty(loaded.shape))
