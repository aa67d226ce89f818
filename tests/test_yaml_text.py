"""YAML as configs mean it: 1.2, each key once, no larger than a config is."""

from __future__ import annotations

import math
import time

import pytest
import yaml

from specforge_core.errors import ConfigError
from specforge_core.yaml_text import MAX_DEPTH, MAX_VALUES, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("+5", 5),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("{a:b: c, 'd:e': , f: }", {"a:b": "c", "d:e": None, "f": None}),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
        ("-.INF", -math.inf),
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2024-13-45", "2024-13-45"),
        ("=", "="),
        ("!!str 12", "12"),
        ("{on: 1}", {"on": 1}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x {p: 1, q: 1}\nb: {<<: *x, q: 2}", {"a": {"p": 1, "q": 1}, "b": {"p": 1, "q": 2}}),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, eval("[" * MAX_DEPTH + "]" * MAX_DEPTH)),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(text, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "in line 3, column 1: the key 'a' is in line 1 too"),
        ("{a: 1, 'a': 2}", "the key 'a' is in line 1 too"),
        ("a: {b:c.jsonl}", "in line 1, column 5: behind a colon stands a space: {b: c.jsonl}"),
        ("? [1]\n: 2", "a key is text"),
        ("? {}\n: 2", "a key is text"),
        ("1: a", "the key 1 is no text: quote it"),
        ("~: a", "the key ~ is no text"),
        ("a: &x {b: *x}", "*x is inside of itself"),
        ("&x [*x]", "*x is inside of itself"),
        ("*x", "found undefined alias"),
        ("9" * 5000, "is no int that can be used"),
        ("1e999", "'1e999' is too large a number: quote it"),
        ("!!int a", "'a' is no int that can be used"),
        ("!!int 1_0", "is no int"),
        ("!!float [1]", "expected a scalar node"),
        ("!!bool yes", "is no bool"),
        ("!!timestamp 2024-13-45", "the tag !!timestamp makes no value of a config"),
        ("!!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd makes no"),
        ("!mine x", "the tag !mine makes no value"),
        ("!!binary a", "the tag !!binary makes no value"),
        ("!!set {a}", "the tag !!set makes no value"),
        ("- <<", "makes no value"),
        ("<<: 1", "expected a mapping or list of mappings"),
        ('"\\0"', "text holds a NUL"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\0": 1}', "text holds a NUL"),
        ("\a", "special characters are not allowed"),
        ("---\na\n---\nb", "in line 3, column 1: expected a single document"),
        ("a: b: c", "mapping values are not allowed here"),
        ("\ta: 1", "cannot start any token"),
        ("%YAML 9.0\n---\na", "incompatible YAML document"),
        ("[" * 33, f"nested deeper than {MAX_DEPTH}"),
        ("x" * (1 << 21), "more than 1048576 characters"),
    ],
)
def test_what_is_no_value_says_where(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "here")
    assert str(error.value).startswith("here")
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[" * 10**6, "{" * 10**6, "- " * 500_000, "? " * 500_000])
def test_nesting_is_left_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="nested deeper"):
        parse(text, "here")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("use", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_do_not_multiply(use: str) -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(9)) + "}"]
    for level in range(1, 12):
        again = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {use.format(again)}")
    with pytest.raises(ConfigError, match=f"there are more than {MAX_VALUES} values"):
        parse("\n".join(lines), "here")


@pytest.mark.parametrize(
    "value",
    [
        *("on", "1e-4", "010", "0o7", "1:30", "<<", "=", "null", "2024-01-01", "12e4567", "", "~"),
        *(1e-4, 1e300, True, None, math.inf, -3, {"a": [1, {"b": "no"}]}, "ü\n\ttext"),
    ],
)
def test_what_is_written_is_read_again(value: object) -> None:
    assert parse(dump(value), "here") == value
    assert yaml.safe_load(dump({"key": value})) == {"key": value}  # by readers of 1.1 too
