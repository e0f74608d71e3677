"""Moment propagation: mean and variance of every activation in one pass, instead of sampling.

`moment_rules` has the rule of each kind of layer; this module traces a network's graph and runs it on moments.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bayeslayers.inputs import Batch
from bayeslayers.layers import BayesianLayer
from bayeslayers.outputs import Output, selected, tensor_output
from bayeslayers.prediction.chunks import Plan, Run
from bayeslayers.prediction.moment_rules import RULES, Moments, no_rule, rectified


def propagate(model: nn.Module, x: Tensor) -> Moments:
    """Return mean and variance of the outputs under the posterior, for deterministic inputs.

    Everything before the first Bayesian layer runs as usual. Where two branches meet in a sum, their
    variances are added, although the branches share their input.

    Raises:
        ValueError: If a module or function has no rule.
    """
    return _propagated(_traced(model), x)


def moment_points(model: nn.Module, plan: Plan) -> Iterator[Run]:
    """Propagate moments once, and represent the Gaussian of the outputs by `num_samples` points.

    The points are quasi-random (always the same scrambled Sobol sequence) and come in pairs around the
    mean; they have exactly the propagated mean and variance. A link without a closed-form
    expectation, such as the softmax, is averaged over them.
    """
    graph = _traced(model)

    def run(batch: Batch) -> Iterator[Tensor]:
        mean, variance = _propagated(graph, batch, plan.output)
        deviation = variance.sqrt()
        channels = mean.shape[1] if mean.dim() > 1 else 1
        for point in standard_points(plan.num_samples, channels).to(mean):
            yield torch.addcmul(mean, deviation, point.view(-1, *[1] * (mean.dim() - 2))).unsqueeze(0)

    yield run


def standard_points(number: int, dimensions: int) -> Tensor:
    """Return points that represent N(0, 1) in each dimension, `(number, dimensions)`, float64.

    They lie in pairs around 0, with one at 0 if their number is odd. Their variance is 1 unless there is only one.
    """
    if (pairs := number // 2) == 0:
        return torch.zeros(number, dimensions, dtype=torch.float64)
    uniform = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(pairs, dtype=torch.float64)
    half = torch.special.ndtri(uniform + 2**-31)  # the centres of the sequence's cells of width 2^-30
    points = torch.cat([half, -half, half.new_zeros(number % 2, dimensions)])
    return points / points.square().mean(0).sqrt()


_tracing = threading.Lock()  # torch.fx traces by changing nn.Module itself


class _Tracer(fx.Tracer):
    """Treats as leaves the modules that torch or this library defines, and those with tensors but no submodules.

    Concurrent calls of other threads are not traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, BayesianLayer):
            return True
        own = next(m.children(), None) is None and next(iter(m.state_dict()), None) is not None
        return own or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.GraphModule:
    if _Tracer().is_leaf_module(model, ""):
        model = nn.Sequential(model)
    try:
        with _tracing:
            return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # a forward can fail on the tracer's proxy in any way
        raise ValueError(
            f"model must have a forward that torch.fx can trace, for method 'moments', got {type(model).__name__}, "
            f"where it cannot: {str(error).splitlines()[0]}"
        ) from None


def _propagated(graph: fx.GraphModule, x: Batch, part: Output | None = None) -> Moments:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be one tensor for method 'moments', got {x!r}. Use method='sample' or 'local'.")
    interpreter = _Propagation(graph)
    interpreter.extra_traceback = False  # errors stay one sentence
    output = selected(interpreter.run(x), part)
    return output if isinstance(output, Moments) else Moments(tensor_output(output), torch.zeros_like(output))


class _Propagation(fx.Interpreter):
    """Runs a graph on tensors, and on moments from the first Bayesian layer on."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if any(f"{name}_precision" in module._buffers for name in module._parameters):
            args = tuple(Moments(x, torch.zeros_like(x)) if isinstance(x, Tensor) else x for x in args)
        if not any(isinstance(x, Moments) for x in args):
            return super().call_module(target, args, kwargs)
        rule = next((RULES[kind] for kind in type(module).__mro__ if kind in RULES), None)
        if rule is None or len(args) != 1 or kwargs:
            raise no_rule(f"{type(module).__name__} (layer '{target}')")
        return rule(module, args[0])

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(target, target, args, kwargs)

    def call_method(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(target, getattr(Tensor, target), args, kwargs)

    def _call(self, key: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moments = [x for x in (*args, *kwargs.values()) if isinstance(x, Moments)]
        if not moments:
            return function(*args, **kwargs)
        first, *rest = args
        if key in _SUMS and len(args) == 2 and not kwargs:
            parts = [x if isinstance(x, Moments) else Moments(x, 0) for x in args]  # pyright: ignore[reportArgumentType]
            return Moments(parts[0].mean + parts[1].mean, parts[0].variance + parts[1].variance)
        if key in _RESHAPES and moments == [first]:
            return Moments(*(function(part, *rest, **kwargs) for part in first))
        if key in (F.relu, torch.relu, "relu") and isinstance(first, Moments):
            return rectified(0.0, first)
        raise no_rule(getattr(key, "__name__", str(key)))


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
# F.pad is one of them: padded zeros, its default, have zero mean and variance, and a copied element keeps its own.
_RESHAPES = (operator.getitem, torch.flatten, F.pad, "flatten", "view", "reshape", "contiguous")
