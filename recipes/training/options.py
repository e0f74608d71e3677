"""The fields of a configuration as options: their names, types, defaults and texts, and how a value is read."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from bayeslayers.checks import did_you_mean
from recipes.training.plain_yaml import MAX_DEPTH, check_text, read_yaml

T = TypeVar("T")
_RULES = {  # pydantic's words for what a value should be, and ours
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "an object": "a mapping of names to values",
}


@dataclass(frozen=True)
class Option:
    """A field of a configuration, or of a part of it.

    Attributes:
        path: Its name, behind those of the parts that it stands in.
        kind: Its type.
        default: Its value if it is not given; `dataclasses.MISSING` if it must be given.
        text: What it is, from the docstring of its class.
    """

    path: tuple[str, ...]
    kind: Any
    default: Any
    text: str


def options(kind: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield every field of a dataclass, those of its parts behind the part itself."""
    texts, hints = _texts(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Option((*path, field.name), hint, default, texts[field.name])
        if (inner := _dataclass_in(hint)) is not None:
            yield from options(inner, (*path, field.name))


def type_name(kind: Any) -> str:
    """Return a type as the help shows it.

    >>> type_name(list[int]), type_name(str | None), type_name(Literal["a", "b"]), type_name(dict[str, Any])
    ('list of int', 'str or null', 'a or b', 'object')
    """
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    if _is_union(kind):
        return " or ".join("null" if arm is types.NoneType else type_name(arm) for arm in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {type_name(typing.get_args(kind)[0])}"
    return "object" if typing.get_origin(kind) is dict or dataclasses.is_dataclass(kind) else kind.__name__


def override(values: dict[str, Any], kind: type, path: tuple[str, ...], text: str) -> None:
    """Write the value of an option into the values of a configuration.

    A part that is given whole changes the fields that it names, a field of free keys, as `model`, is replaced.

    Args:
        values: Plain data, as a file holds it.
        kind: The configuration's class.
        path: Of the option.
        text: Its value, as it was typed.

    Raises:
        ValueError: If there is no such option, or its value cannot be read.
    """
    name = ".".join(path)
    if len(path) > MAX_DEPTH:
        raise ValueError(f"option --{path[0]}... must be at most {MAX_DEPTH} levels deep, got {len(path)}.")
    leaf = _kind_at(kind, path)
    value = _read(leaf, text, f"--{name}")
    for part in path[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    part = _dataclass_in(leaf) is not None and isinstance(value, dict)
    values[path[-1]] = (values.get(path[-1]) or {}) | value if part else value


def configuration(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the configuration that plain data makes.

    Args:
        kind: Its class, a dataclass with `__pydantic_config__`.
        values: The data.

    Raises:
        ValueError: If a field is unknown, missing or of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError(_sentence(error, kind)) from None


def _sentence(error: Any, kind: type) -> str:
    """Return the first thing that is wrong with a configuration; a field that is unknown before one that is missing."""
    found = sorted(error.errors(), key=lambda one: ("unexpected" not in one["type"], one["type"] == "missing"))[0]
    path = tuple(str(part) for part in found["loc"])
    name = ".".join(path)
    if "unexpected" in found["type"]:
        inner = _dataclass_in(_kind_at(kind, path[:-1]))
        known = [field.name for field in dataclasses.fields(inner)] if inner else []
        where = f" of {'.'.join(path[:-1])}" if path[1:] else ""
        return f"unknown option {path[-1]!r}{where}.{did_you_mean(path[-1], known)} Known: {', '.join(known)}."
    if found["type"] == "missing":
        return f"{name} must be given."
    rule = found["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    rule = _RULES.get(rule, rule)
    return f"{name} must be {rule}, got {found['input']!r}."


def _read(kind: Any, text: str, name: str) -> Any:
    """Return the value that a text stands for: text where text is wanted, else as in a file."""
    arms = typing.get_args(kind) if _is_union(kind) else (kind,)
    if any(arm is str or typing.get_origin(arm) is Literal for arm in arms):
        return None if text == "null" and types.NoneType in arms else check_text(text, name)
    return read_yaml(text, name)


def _kind_at(kind: Any, path: tuple[str, ...]) -> Any:
    """Return the type of a field, Any for what stands in a field of free keys or in no field at all.

    Raises:
        ValueError: If the path goes on below a field that has no parts.
    """
    for number, part in enumerate(path):
        if kind is Any or typing.get_origin(kind) in (dict, list):
            return Any
        if (inner := _dataclass_in(kind)) is None:
            above = ".".join(path[:number])
            raise ValueError(f"unknown option '{'.'.join(path)}': {above} is {type_name(kind)}, without parts.")
        kind = typing.get_type_hints(inner).get(part, Any)
    return kind


def _dataclass_in(kind: Any) -> type | None:
    """Return the dataclass that a type is, or is beside None."""
    arms = typing.get_args(kind) if _is_union(kind) else (kind,)
    return next((arm for arm in arms if isinstance(arm, type) and dataclasses.is_dataclass(arm)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _texts(kind: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its bases say of each field, under "Attributes:"."""
    found: list[tuple[str, str]] = []
    for base in reversed(kind.__mro__[:-1]):
        section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        found += re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
