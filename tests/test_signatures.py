"""What users call is typed: every parameter and every result of a public function, method and property."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import bayeslayers as bl
import zoo

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (bl, zoo, bl.metrics, bl.plots)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
OF_TORCH = {"forward", "extra_repr", "reset_parameters"}  # whose types are those of the class of torch.nn


def functions(name, thing):
    """Yield each function behind a public name: itself, or the constructor, methods and properties of a class."""
    if not inspect.isclass(thing):
        if callable(thing):
            yield name, thing
        return
    for key, member in members(thing):
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        own = getattr(function, "__module__", None) or ""
        public = key == "__init__" or not key.startswith("_")
        if inspect.isfunction(function) and public and own.partition(".")[0] in ("bayeslayers", "zoo"):
            if key not in OF_TORCH and not (key == "__init__" and dataclasses.is_dataclass(thing)):
                yield f"{name}.{key}", function


def members(thing):
    """Return what a class has by name, without calling its properties."""
    return [(key, inspect.getattr_static(thing, key)) for key in dir(thing)]


def missing(function):
    """Return the parameters of a function without a type, and "return" where its result has none."""
    parameters = list(inspect.signature(function).parameters.values())
    found = [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
    found = [name for name in found if name not in ("self", "cls")]
    typed = function.__name__ == "__init__" or "return" in function.__annotations__
    return found if typed else [*found, "return"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_signature_is_typed(name):
    assert {where: gaps for where, function in functions(name, PUBLIC[name]) if (gaps := missing(function))} == {}


def test_gaps_are_seen():
    class Public:
        def method(self, x, y: int):
            return x

        method.__module__ = "bayeslayers.example"

    assert {name: missing(function) for name, function in functions("P", Public)} == {"P.method": ["x", "return"]}
    assert len(list(functions("VOGN", bl.VOGN))) > 3 and len(PUBLIC) > 60
