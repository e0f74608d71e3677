"""Bayesian versions of subclasses of the torch.nn layers: their own forward, its one op rerouted to the posterior.

A subclass (timm's `BatchNormAct2d`, say) overrides `forward`, so the Bayesian layer of its base would
compute something else. Its forward is therefore run as it is, under a mode that sees every torch
function it calls: the layer's weight and bias become the scope's draw, and the op that takes them
(`F.conv2d`, `F.layer_norm`, ...) the op with a curvature rule. A use of the weight in any other op has
no exact curvature, and is refused.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple
from torch.overrides import TorchFunctionMode

from bayeslayers import curvature
from bayeslayers.curvature.accumulate import Leaves, tally
from bayeslayers.curvature.rule import CurvatureRule
from bayeslayers.curvature.settings import Settings
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.scope import OUTSIDE, Scope, opened, scope_for


class CurvatureError(RuntimeError):
    """A layer's own forward uses its weight where no curvature rule applies."""


@functools.cache
def bayesian_subclass(
    ordinary: type[nn.Module], base: type[nn.Module], bayesian: type[BayesianLayer]
) -> type[BayesianLayer]:
    """Return the Bayesian version of a subclass of a layer, the same class each time.

    Args:
        ordinary: The subclass.
        base: The layer that it is derived from.
        bayesian: The Bayesian version of `base`.
    """
    if ordinary is base:  # a class of another library, known by its name
        bases = (bayesian, ordinary)
    elif all(getattr(ordinary, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")):
        bases = (ordinary, bayesian)
    else:
        bases = (ReroutedLayer, ordinary)
    members = {
        "ordinary": ordinary,
        "origin": (ordinary, base, bayesian),
        "rule": bayesian.rule,
        "prior_means": bayesian.prior_means,
        "__reduce_ex__": _reduce,
        "__module__": __name__,
        "__doc__": f"`{ordinary.__name__}` with a Gaussian posterior.",
    }
    return type(f"Bayes{ordinary.__name__}", bases, members)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy a layer by the classes its own is made from, for its own cannot be imported."""
    _, _, *state = object.__reduce_ex__(self, protocol)
    return (_blank, type(self).origin, *state)


def _blank(*origin: Any) -> nn.Module:
    kind: Any = bayesian_subclass(*origin)
    return kind.__new__(kind)


class ReroutedLayer(BayesianLayer):
    """A Bayesian layer that computes with the forward of the ordinary class it is derived from."""

    ordinary: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if scope_for(self) is OUTSIDE:
            return super().forward(*args, **kwargs)
        with _Reroute(self):
            return super().forward(*args, **kwargs)


class _Reroute(TorchFunctionMode):
    """Gives the functions that one forward of one layer calls its drawn weights, and fills its leaves.

    Attributes:
        examples: Size of dimension 0 of the input of each op that a curvature rule took.
    """

    def __init__(self, layer: BayesianLayer):
        super().__init__()
        self.name = type(layer).__name__.removeprefix("Bayes")
        own = layer._parameters
        means = {key: own[key] if key in own else getattr(layer, key) for key in layer.rule.tensors}
        tensors, self.leaves, _ = layer.operands()
        self.values = dict(zip(means, tensors, strict=True))
        self.drawn = {id(mean): self.values[key] for key, mean in means.items() if mean is not None}
        self.examples: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._draw(args), self._draw(kwargs or {})
        if self.leaves is None:
            return func(*args, **kwargs)
        if rule := _RULES.get(func):
            output = rule(self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        self._refuse_other_use(func, (args, kwargs), output)
        return output

    def _draw(self, value: Any) -> Any:
        """Return a function's arguments with the means replaced by the draw."""
        if isinstance(value, Tensor):
            return self.drawn.get(id(value), value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._draw, value)) if type(value) in (tuple, list) else value
        return {key: self._draw(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _refuse_other_use(self, func: Any, arguments: Any, output: Any) -> None:
        outputs = [x for x in _tensors(output) if x.requires_grad]
        for key, value in self.values.items():
            if value is None or not value.requires_grad or not outputs or any(x is value for x in outputs):
                continue
            if any(x is value for x in _tensors(arguments)):
                name = getattr(func, "__name__", str(func))
                raise CurvatureError(
                    f"the forward of {self.name} uses its {key} in {name!r}, for which there is no curvature rule"
                )

    def computed(
        self,
        rule: CurvatureRule,
        input: Tensor,
        *tensors: Tensor | None,
        settings: Any = (),
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """Return the output of an op by its rule, NotImplemented if the tensors are not the layer's.

        Args:
            rule: Rule of the op.
            input: The op's input.
            *tensors: What the op has in the places of the rule's tensors.
            settings: As the rule takes them.
            prepare: What is done to the input first, if the tensors are the layer's.
        """
        leaves = self.leaves_of(rule, len(input), *tensors)
        if leaves is None:
            return NotImplemented
        return rule((input if prepare is None else prepare(input),), tensors, leaves, settings)

    def leaves_of(self, rule: CurvatureRule, examples: int, *tensors: Tensor | None) -> Leaves | None:
        """Return the leaves that an op of these tensors fills, by the op's names; None if they are not the layer's."""
        given = {key: x for key, x in zip(rule.tensors, tensors, strict=True) if x is not None}
        names = {key: own for key, x in given.items() for own, value in self.values.items() if x is value}
        if self.leaves is None or not given or names.keys() != given.keys() or rule.tensors[0] not in given:
            return None
        if self.leaves.kind == "factors" and any(key != own for key, own in names.items()):
            return None
        self.examples.append(examples)
        if self.leaves.kind == "factors":
            return self.leaves
        leaves = self.leaves.tensors
        return self.leaves._replace(tensors={key: leaves[own] for key, own in names.items() if own in leaves})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


# One rule per torch function, with its signature.


def _linear(own: _Reroute, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return own.computed(curvature.LINEAR, input, weight, bias)


def _convolution(own, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    each = _ntuple(weight.dim() - 2)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(each(dilation), weight.shape[2:], strict=True)]
        input = F.pad(input, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
    numbers = each(0 if isinstance(padding, str) else padding)
    settings = Settings(each(stride), numbers, each(dilation), False, each(0), groups)
    return own.computed(curvature.CONVOLUTION, input, weight, bias, settings=settings)


def _transposed(own, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    each = _ntuple(weight.dim() - 2)
    settings = Settings(each(stride), each(padding), each(dilation), True, each(output_padding), groups)
    return own.computed(curvature.CONVOLUTION, input, weight, bias, settings=settings)


def _batch_norm(own, input, running_mean, running_var, weight=None, bias=None, *args, **kwargs):
    def normalise(input: Tensor) -> Tensor:
        return F.batch_norm(input, running_mean, running_var, None, None, *args, **kwargs)

    positions = tuple(range(2, input.dim()))
    return own.computed(curvature.AFFINE, input, weight, bias, settings=positions, prepare=normalise)


def _group_norm(own, input, num_groups, weight=None, bias=None, eps=1e-5):
    def normalise(input: Tensor) -> Tensor:
        return F.group_norm(input, num_groups, None, None, eps)

    positions = tuple(range(2, input.dim()))
    return own.computed(curvature.AFFINE, input, weight, bias, settings=positions, prepare=normalise)


def _layer_norm(own, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    if input.dim() == len(normalized_shape):  # a single example, without its dimension
        return NotImplemented

    def normalise(input: Tensor) -> Tensor:
        return F.layer_norm(input, normalized_shape, None, None, eps)

    positions = tuple(range(1, input.dim() - len(normalized_shape)))
    return own.computed(curvature.AFFINE, input, weight, bias, settings=positions, prepare=normalise)


def _embedding(own, input, weight, padding_idx=None, *args, **kwargs):
    return own.computed(curvature.EMBEDDING, input, weight, settings=padding_idx)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
}


def obstacle(layer: nn.Module, kind: type) -> str | None:
    """Return why a layer cannot become a rerouted `kind`, None if it can: its forward is tried.

    The forward of a copy runs on small inputs of several shapes, as it would under `tracked`; the
    first shape that it accepts decides. It must use the weight once, in an op that has a curvature
    rule, with the examples in dimension 0.
    """
    if not issubclass(kind, ReroutedLayer):
        return None
    failure: Exception | None = None
    for x in _trial_inputs(layer):
        try:
            examples = _examples_of_ops(layer, kind, x)
        except CurvatureError as error:
            return str(error)
        except Exception as error:  # a shape that this forward does not take, or whatever else it raises
            failure = failure or error
            continue
        if examples == [len(x)]:
            return None
        if len(examples) == 1:
            return "its own forward folds other dimensions into that of the examples"
        return f"its own forward uses the weight in {len(examples)} ops, one is expected"
    return f"its own forward could not be tried: {failure}"


def _examples_of_ops(layer: nn.Module, kind: Any, x: Tensor) -> list[int]:
    """Return the size of dimension 0 in each op that a curvature rule takes when a `kind` of the layer runs.

    It runs in eval mode on the CPU, on a copy whose tensors are filled with ones.
    """
    memo: dict[int, Any] = {id(buffer): torch.ones_like(buffer, device="cpu") for buffer in layer.buffers()}
    memo |= {id(p): nn.Parameter(torch.ones_like(p, device="cpu")) for p in layer.parameters()}
    registered = {key: copy.deepcopy(vars(layer)[key], memo) for key in ("_parameters", "_buffers", "_modules")}
    trial: Any = kind.__new__(kind)
    vars(trial).update(vars(layer), **registered)
    trial.eval()
    leaves = Leaves({key: getattr(trial, key) for key in kind.rule.tensors}, tally(0))
    with opened(Scope(leaves={trial: leaves})), torch.device("cpu"), torch.enable_grad(), (own := _Reroute(trial)):
        kind.ordinary.forward(trial, x)
    return own.examples


def _trial_inputs(layer: Any, examples: int = 3) -> Iterator[Tensor]:
    """Yield inputs of the shapes that a layer of this kind may take, channels first and last."""
    if isinstance(layer, nn.Embedding):
        yield torch.zeros(examples, 4, dtype=torch.long, device="cpu")
        return
    sizes = ("in_features", "in_channels", "num_features", "num_channels", "normalized_shape")
    features = next((getattr(layer, size) for size in sizes if hasattr(layer, size)), layer.weight.shape[0])
    features = tuple(features) if isinstance(features, tuple | list) else (features,)
    side = 2 * max(layer.weight.shape[2:], default=2) * max(getattr(layer, "dilation", (1,)))
    for dims in (2, 1, 0, 3):
        for shape in ((*features, *[side] * dims), (*[side] * dims, *features)):
            yield torch.ones(examples, *shape, dtype=layer.weight.dtype, device="cpu", requires_grad=True)
