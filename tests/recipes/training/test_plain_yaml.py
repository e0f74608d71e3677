from __future__ import annotations

import math
import re

import pytest
import yaml

from recipes.cli.train import CONFIGS
from recipes.training.plain_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, read_yaml

FILES = sorted(CONFIGS.rglob("*.yaml"))


def typed(value):
    """The value with the type of everything in it."""
    if isinstance(value, dict):
        return {key: typed(part) for key, part in value.items()}
    return [typed(part) for part in value] if isinstance(value, list) else (type(value), value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bundled_files_are_read_as_pyyaml_reads_them(path):
    text = path.read_text()
    signed = re.sub(r"(\d\.\d+e)(\d)", r"\1+\2", text)  # without a sign it is text to PyYAML, as in YAML 1.1
    assert typed(read_yaml(text, "it")) == typed(yaml.safe_load(signed))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("-7", -7),
        ("9" * 101, "9" * 101),
        ("-.inf", -math.inf),
        ("null", None),
        ("", None),
        ("# nothing", None),
        ("{a: }", {"a": None}),
        ("On", True),
        ("no", False),
        ("'no'", "no"),
        ("'1'", "1"),
        ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"),
        ("{yes: 1, 5: 2}", {"yes": 1, "5": 2}),
        ("é ü 日本", "é ü 日本"),
        ("[&a {b: [1]}, *a]", [{"b": [1]}, {"b": [1]}]),
        ("{one: &a {b: 1, c: 2}, two: {<<: *a, c: 3}}", {"one": {"b": 1, "c": 2}, "two": {"b": 1, "c": 3}}),
        ("[&a {b: 1}, {<<: [*a, {b: 2, c: 3}], d: 4}]", [{"b": 1}, {"b": 1, "c": 3, "d": 4}]),
    ],
)
def test_words_stand_for_these_values(text, value):
    assert typed(read_yaml(text, "it")) == typed(value)


def test_an_alias_is_a_copy():
    first, second = read_yaml("[&a {b: [1]}, *a]", "it")
    first["b"].append(2)
    assert second == {"b": [1]}


def deep(levels):
    return "[" * levels + "]" * levels


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system [echo]", "plain data, got the tag 'tag:yaml.org,2002:python"),
        ("a: !!python/name:os.system", "got the tag"),
        ("a: !!set {b, c}", "got the tag"),
        ("a: !!int '5'", "got the tag"),
        ("! a", "got the tag '!'"),
        ("!!str a: 1", "words as keys"),
        ("a: 1\na: 2", "each key once, got 'a' twice"),
        ("{b: {a: 1, 'a': 2}}", "each key once"),
        ("? [1]\n: 2", "words as keys"),
        ("? {a: 1}\n: 2", "words as keys"),
        ("*a", "define &a before"),
        ("&a [*a]", "define &a before"),
        ("&a {<<: *a}", "define &a before"),
        ("{<<: 5}", "merge mappings by <<, got 5"),
        ("a: 1\n---\nb: 2", "one document"),
        ("name: [", "must be YAML, got an error in line 1, column 8"),
        ("a: b: c", "must be YAML"),
        ("\0", "must be YAML"),
        ("@a", "must be YAML"),
        (r'"\x1b[31m"', r"control character or broken Unicode '\\x1b'"),
        (r'"\ud800"', r"broken Unicode '\\ud800'"),
        (r'{"\0": 1}', "control character"),
        (deep(MAX_DEPTH + 2), f"at most {MAX_DEPTH} levels deep"),
        (deep(20_000), f"at most {MAX_DEPTH} levels deep"),
        ("{a: " * 20_000, f"at most {MAX_DEPTH} levels deep"),
        (BOMB, f"at most {MAX_VALUES:,} values"),
        ("[" + "1," * MAX_VALUES + "]", f"at most {MAX_VALUES:,} values"),
        ("a" * (MAX_CHARACTERS + 1), f"at most {MAX_CHARACTERS:,} characters"),
    ],
    ids=range(28),
)
def test_what_is_no_plain_data_is_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(text, "file")
    assert str(caught.value).startswith("file must ") and len(str(caught.value)) < 300


def test_bounds_let_through_what_is_within_them():
    assert read_yaml(deep(MAX_DEPTH + 1), "it") and len(read_yaml("[" + "1," * (MAX_VALUES - 1) + "]", "it")) == 9_999
    assert len(read_yaml("a" * MAX_CHARACTERS, "it")) == MAX_CHARACTERS
