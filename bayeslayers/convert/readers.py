"""Modules that read the weight of a layer inside them, instead of calling the layer.

A layer that is known to be read so gives the sample and takes its curvature there too (`BayesianLayer.is_read`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

from bayeslayers.layers import BayesianLayer

# In eval mode torch's encoder has a fused path that reads the weights of its layers. These attributes turn it off.
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# An attention that becomes Bayesian calls its output projection; the conversion sees to those that stay.
_CALL_THEIR_LAYERS = (*_FAST_PATHS, nn.MultiheadAttention)

_METADATA = ("dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad")


def readers_of(net: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the modules of which another module's forward reads a parameter, with that module.

    The source of each class is searched for reads as `self.qkv.weight`, in its forward and what that
    calls of it. A read by other means is found by the optimiser, which refuses a gradient that comes
    past the layer.
    """
    readers = {}
    for parent in net.modules():
        if any(isinstance(parent, kind) and type(parent).forward is kind.forward for kind in _CALL_THEIR_LAYERS):
            continue
        for name, key in _children_read(type(parent)):
            if (child := parent._modules.get(name)) is not None and key in child._parameters:
                readers[child] = parent
    return readers


def turn_off_fast_paths(net: nn.Module) -> None:
    """Make torch's transformer encoders call their layers, where some of these are Bayesian."""
    for container in net.modules():
        for kind, (attribute, value) in _FAST_PATHS.items():
            if isinstance(container, kind) and any(isinstance(m, BayesianLayer) for m in container.modules()):
                setattr(container, attribute, value)


@functools.cache
def _children_read(kind: type[nn.Module]) -> frozenset[tuple[str, str]]:
    """Return the names of children of which the forward of a class reads an attribute, each with that attribute."""
    found, seen, methods = set(), set(), ["forward"]
    while methods:
        method = getattr(kind, methods.pop(), None)
        method = getattr(method, "fget", method)
        if not inspect.isfunction(method) or method in seen:
            continue
        seen.add(method)
        nodes = _nodes(method)
        metadata = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in _METADATA}
        for node in nodes:
            match node:
                case ast.Call(ast.Name("isinstance"), [argument, *_]):
                    metadata.add(id(argument))
        for node in nodes:
            match node:
                case ast.Attribute(ast.Attribute(ast.Name("self"), child), key):
                    found |= set() if id(node) in metadata else {(child, key)}
                case ast.Attribute(ast.Name("self"), called):
                    methods.append(called)
    return frozenset(found)


def _nodes(function: Any) -> list[ast.AST]:
    """Return the nodes of a function's source, none if that is not to be had."""
    try:
        return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    except (OSError, SyntaxError):
        return []
