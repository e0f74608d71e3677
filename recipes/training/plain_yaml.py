"""YAML that is read as data alone: no tag, no class, no name to import; bounded in size, depth and number of values.

PyYAML parses the text into events, of which this file builds mappings, lists, numbers and text. Words without quotes
are read by the core schema of YAML 1.2 (1e-3 is a number, 010 is ten), with the "yes" and "on" of YAML 1.1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

MAX_CHARACTERS = 100_000
MAX_DEPTH = 20
MAX_VALUES = 10_000  # with those that aliases repeat

_CONSTANTS = {word: None for word in ("", "~", "null", "Null", "NULL")} | {
    form: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}
_NUMBERS = {
    r"[-+]?[0-9]+(_[0-9]+)*": int,
    r"0x[0-9a-fA-F]+|0o[0-7]+": lambda word: int(word, 0),
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?": float,
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)": lambda word: float(word.replace(".", "")),
}
_LONGEST_NUMBER = 100  # characters; a longer one is text
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read_yaml(text: str, source: str) -> Any:
    """Return the value that a text in YAML stands for, None for an empty one.

    Args:
        text: One document.
        source: What the text is, for messages.

    Raises:
        ValueError: If it is no YAML, has a tag, a repeated key, a key that is no text, control characters or an alias
            without an anchor before it, or is too long, too deep or of too many values.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{source} must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}.")
    try:
        return _Document(yaml.parse(text, Loader=yaml.SafeLoader), source).read()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise ValueError(f"{source} must be YAML, got an error{where}: {problem}.") from None


def check_text(text: str, source: str) -> str:
    """Return a text if it is one: without control characters but tab and line ends, and without broken Unicode."""
    if found := _NO_TEXT.search(text):
        raise ValueError(f"{source} must be text, got the control character or broken Unicode {found[0]!a}.")
    return text


class _Document:
    """The only document of a stream of events."""

    def __init__(self, events: Iterator[Any], source: str):
        self.events, self.source = events, source
        self.values = 0
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, and of how many values it is

    def read(self) -> Any:
        from yaml.events import DocumentStartEvent, StreamEndEvent

        next(self.events)  # the start of the stream
        if isinstance(next(self.events), StreamEndEvent):
            return None
        value = self._value(next(self.events), 0)
        next(self.events)  # the end of the document
        if isinstance(next(self.events), DocumentStartEvent):
            raise ValueError(f"{self.source} must hold one document, got several.")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        from yaml.events import AliasEvent, MappingStartEvent, ScalarEvent

        self._count(1)
        if isinstance(event, AliasEvent):
            return self._repeated(event.anchor)
        if event.tag is not None:
            raise ValueError(f"{self.source} must hold plain data, got the tag {event.tag!r}. Leave it out.")
        if depth > MAX_DEPTH:
            raise ValueError(f"{self.source} must be at most {MAX_DEPTH} levels deep, got more.")
        before = self.values
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        else:
            value = (self._mapping if isinstance(event, MappingStartEvent) else self._list)(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.values - before
        return value

    def _count(self, values: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise ValueError(f"{self.source} must hold at most {MAX_VALUES:,} values, got more.")

    def _repeated(self, anchor: str) -> Any:
        if anchor not in self.anchors:
            raise ValueError(f"{self.source} must define &{anchor} before *{anchor}, got no such anchor.")
        value, size = self.anchors[anchor]
        self._count(size)
        return copy.deepcopy(value)

    def _scalar(self, event: Any) -> Any:
        text = check_text(event.value, self.source)
        return _plain(text) if event.implicit[0] else text

    def _list(self, depth: int) -> list[Any]:
        from yaml.events import SequenceEndEvent

        found = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            found.append(self._value(event, depth + 1))
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        from yaml.events import MappingEndEvent, ScalarEvent

        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                raise ValueError(f"{self.source} must have words as keys, got another kind of key.")
            key = check_text(event.value, self.source)
            value = self._value(next(self.events), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged = self._merged(value) | merged
            elif key in found:
                raise ValueError(f"{self.source} must give each key once, got {key!r} twice.")
            else:
                found[key] = value
        return merged | found

    def _merged(self, value: Any) -> dict[str, Any]:
        """Return what `<<` adds to a mapping: the first of several mappings that have a key gives its value."""
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{self.source} must merge mappings by <<, got {value!r}.")
        return {key: found for part in reversed(parts) for key, found in part.items()}


def _plain(word: str) -> Any:
    """Return what a word without quotes stands for.

    >>> [_plain(word) for word in ("1e-3", "5", "Yes", "~", "0x10", "2001-01-01", "-.inf", "1.")]
    [0.001, 5, True, None, 16, '2001-01-01', -inf, 1.0]
    """
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if len(word) <= _LONGEST_NUMBER:
        for form, number in _NUMBERS.items():
            if re.fullmatch(form, word):
                return number(word)
    return word
