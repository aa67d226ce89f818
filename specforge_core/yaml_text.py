"""YAML as a config means it: version 1.2, without its traps, and no larger than a config is.

PyYAML reads version 1.1, where 010 is 8, 1:30 is 90, `no` is false and 1e-4 is text; it lets a
second key replace the first, and a value hold itself.  Here all of these are refused or read as
YAML 1.2 says, tags other than those of JSON's values are refused, and every error has its line.
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from .errors import ConfigError
from .text import cut

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000  # with all that aliases repeat
MAX_DIGITS = 400  # 1e308 written out has 309
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
CORE_SCHEMA = (  # in the order they are tried, with the characters each begins with
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)


def read_file(path: Path) -> object:
    """Return what a YAML file holds.  Raises ConfigError."""
    name = repr(str(path))
    try:
        # a named pipe would be waited for
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"config file {name} is not a file. Try: -c PATH of a YAML file")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"config file {name} cannot be read: {reason}. Try: -c PATH") from exc
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"config file {name} is larger than {MAX_BYTES} bytes: it is no config. "
            "Try: -c PATH of a YAML file"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"config file {name} is not UTF-8 text (byte {exc.start}). Try: -c PATH of a YAML "
            "file, or save it as UTF-8"
        ) from exc
    return parse(text, str(path))


def parse(text: str, origin: str) -> Any:
    """Return the value that a YAML text holds, or None for an empty one.

    `origin` begins the message of the ConfigError raised for anything else.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin}: the value has more than {MAX_BYTES} characters")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = " ".join(filter(None, (exc.context, exc.problem)))
        raise ConfigError(f"{origin} is not valid YAML{where}: {cut(problem, 300)}") from exc
    except yaml.YAMLError as exc:  # of a character
        raise ConfigError(f"{origin} is not valid YAML: {cut(str(exc), 300)}") from exc


def dump(value: object) -> str:
    """Return YAML that this module and readers of YAML 1.1 read alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, begins in CORE_SCHEMA:
        for character in begins:
            entry = (TAG + kind, re.compile(rf"(?:{pattern})\Z"))
            found.setdefault(character, []).append(entry)
    return found


class _Loader(yaml.SafeLoader):
    yaml_constructors: ClassVar[Any] = {
        key: function
        for key, function in yaml.SafeLoader.yaml_constructors.items()
        if key is not None and key.removeprefix(TAG) in ("null", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.yaml_implicit_resolvers = _resolvers()
        self.depth = 0
        self.values = 0
        self.sizes: dict[Node, int] = {}  # of nodes that are complete

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Refuse what is too deep, too large, or inside itself."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.depth == MAX_DEPTH:
            raise _error(f"values are nested deeper than {MAX_DEPTH}", event.start_mark)
        before = self.values
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if node not in self.sizes:
                raise _error(f"*{event.anchor} is inside of itself", event.start_mark)
            self.values += self.sizes[node]
        else:
            self.values += 1
            self.sizes[node] = self.values - before
        if self.values > MAX_VALUES:
            raise _error(f"there are more than {MAX_VALUES} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Refuse keys that are not text, a second one of a name, and {a:b}, which is one key."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise _error("a key is text", key.start_mark)
            if key.tag not in (f"{TAG}str", MERGE):
                raise _error(f"the key {cut(key.value)} is no text: quote it", key.start_mark)
            glued = node.flow_style and key.style is None and ":" in key.value
            if glued and isinstance(value, ScalarNode) and not value.value and not value.style:
                spaced = cut(key.value.replace(":", ": ", 1))
                raise _error(f"behind a colon stands a space: {{{spaced}}}", key.start_mark)
            if first := lines.get((key.tag, key.value)):
                raise _error(f"the key {cut(key.value)!r} is in line {first} too", key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_plain(self, node: Node) -> bool | int | float:
        """Read what CORE_SCHEMA calls a bool or a number; a tag may call anything so."""
        kind, text = node.tag.removeprefix(TAG), self.construct_scalar(node)
        pattern = {name: pattern for name, pattern, _ in CORE_SCHEMA}[kind]
        if len(text) > MAX_DIGITS or not re.fullmatch(pattern, text):
            raise _error(f"{cut(text)!r} is no {kind} that can be used", node.start_mark)
        if kind == "bool":
            return bool(text.lower() == "true")
        if kind == "float":
            value = float(re.sub(r"(?i)\.(?=inf|nan)", "", text))
            if math.isinf(value) and "inf" not in text.lower():
                raise _error(f"{cut(text)!r} is too large a number: quote it", node.start_mark)
            return value
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def refuse_tag(self, node: Node) -> Any:
        """Say that only what JSON has too can be written."""
        tag = node.tag.replace(TAG, "!!")
        raise _error(f"the tag {cut(tag)} makes no value of a config", node.start_mark)

    def construct_scalar(self, node: Any) -> Any:
        """Refuse text that no file name, model or log can hold."""
        text = super().construct_scalar(node)
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise _error("text holds a NUL or half of a surrogate pair", node.start_mark)
        return text


for _kind in ("bool", "int", "float"):
    _Loader.add_constructor(TAG + _kind, _Loader.construct_plain)
_Loader.add_constructor(None, _Loader.refuse_tag)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        """Write a value as often as it is used."""
        return True


for _kind, _pattern, _begins in CORE_SCHEMA:
    _Dumper.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _begins)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
