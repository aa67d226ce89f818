"""From a YAML file and overrides to a validated config and its strategy.

Two passes: `strategy.name` picks the plugin, whose own model then validates the
`strategy:` section; likewise those of `plugins`; the core validates the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .config import RunConfig, Section
from .errors import ConfigError
from .plugins import PLUGINS, discover
from .records import MASK, in_error, override_in_error, remember_secrets
from .strategy import Strategy
from .text import cut, meant, shorten
from .yaml_text import MAX_DEPTH, parse, read_file

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_ERRORS = 5  # shown of one config
MESSAGE = 300  # characters of one of them
# pydantic's types of errors that name Python's types -> what a file of YAML calls it
PLAIN = {
    "tuple_type": "Input should be a list, as [A, B]",
    "path_type": "Input should be a path",
    "model_type": "Input should be a section, as {KEY: VALUE}",
}
S = TypeVar("S", bound=Section)


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> tuple[RunConfig, Strategy]:
    """Read a YAML file, apply dotted overrides (`train.max_steps=10`), and validate.

    Relative paths inside the file are taken from the working directory.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    raw = read_file(path)
    if raw is None:
        raise ConfigError(f"{path} is empty. `specforge config` prints what it may hold")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(raw).__name__}")
    return raw


def validate(raw: dict[str, Any], origin: str) -> tuple[RunConfig, Strategy]:
    """Validate a config mapping; the plugin it names validates the strategy section."""
    section = raw.get("strategy")
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str):
        raise ConfigError(
            f"{origin}: strategy.name is missing. `specforge strategies` lists what is installed"
        )
    named = {} if raw.get("plugins") is None else raw["plugins"]
    if not isinstance(named, dict):
        raise ConfigError(f"{origin}: plugins must hold a section by plugin, got {shorten(named)}")
    strategy = Strategy.load(name, using=_used(raw, named))
    with strategy.guard("specforge_config", status=2):  # its validators may raise anything
        chosen = _section(strategy.config(), section, origin, ("strategy",), name)
    models = strategy.plugin_configs()
    if unknown := sorted(named.keys() - models.keys()):
        known, first = ", ".join(sorted(discover(PLUGINS))) or "none", cut(unknown[0])
        told = "Did you mean plugins.{0}?"
        hint = meant(first, discover(PLUGINS), told, "`specforge plugins` lists them. ")
        raise ConfigError(
            f"{origin}: plugins.{first}: no installed plugin has this section (installed: "
            f"{known}). {hint}"
        )
    sections = {}
    for key, value in named.items():
        with strategy.guard("specforge_plugin_config", key, status=2):
            given = {} if value is None else value
            sections[key] = _section(models[key], given, origin, ("plugins", key), key)
    try:
        whole = {**raw, "strategy": chosen, "plugins": sections}
        run = RunConfig.model_validate(whole)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin, RunConfig)) from exc
    remember_secrets(run)
    return run, strategy


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set what `KEY=VALUE` says, with dots between the parts of KEY, in a config mapping."""
    key, equals, text = override.partition("=")
    told = override_in_error(override)
    shown = f"override {shorten(told)}"
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)) or len(parents) > MAX_DEPTH:
        raise ConfigError(f"{shown} is not KEY=VALUE. Try: train.max_steps=100")
    if not text:
        raise ConfigError(f"{shown} has no value. Try: {cut(key)}=null, or {cut(key)}=\"''\"")
    try:
        value = parse(text, shown)
    except ConfigError:
        if MASK in told:  # what is wrong shows the text
            raise ConfigError(f"{shown}: the value is not valid YAML") from None
        raise
    node = raw
    for parent in parents:
        inner = node.get(parent)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"{shown}: {shorten(parent)} is not a section")
        node[parent] = node = dict(inner)  # an alias may stand elsewhere too
    node[last] = value


def _explain(
    exc: ValidationError,
    origin: str,
    model: type[BaseModel],
    prefix: tuple[str, ...] = (),
    command: str = "config",
) -> str:
    lines: list[str] = []
    errors = _one_a_value(exc.errors(include_url=False, include_context=False), model)
    for error in errors[:MAX_ERRORS]:
        where = ".".join(cut(str(part)) for part in (*prefix, *error["loc"]))
        if error["type"] == "extra_forbidden":
            hint = _similar(model, error["loc"])
            told = any(hint in line for line in lines)  # a section's keys are listed once
            lines.append(f"{where}: unknown key{'' if told else hint}")
        elif error["type"] == "missing":
            lines.append(f"{where}: required, and missing")
        else:
            message = cut(_message(error), MESSAGE) + _or_null(error, model)
            texts = error["type"] in ("string_type", "path_type")
            quote = texts and not isinstance(error["input"], dict | list)
            hint = ": text that looks like something else stands in quotes" if quote else ""
            got = f"{message}, got {shorten(in_error(error['input'], where))}{hint}"
            lines.append(f"{where}: {got}" if where else message)
    if len(errors) > MAX_ERRORS:
        lines.append(f"and {len(errors) - MAX_ERRORS} more")
    listing = "\n  ".join(lines)
    return f"{origin} is not a valid config:\n  {listing}\nTry: specforge {command}"


def _message(error: ErrorDetails) -> str:
    return PLAIN.get(error["type"], error["msg"].removeprefix("Value error, "))


def _or_null(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Return what belongs to the choices of an option that may be left open."""
    model, depth = _section_at(model, error["loc"])
    kinds = get_args(_kind(model, error["loc"][depth])) if depth < len(error["loc"]) else ()
    return ", or null" if error["type"] == "literal_error" and type(None) in kinds else ""


def _one_a_value(errors: list[ErrorDetails], model: type[BaseModel]) -> list[ErrorDetails]:
    """Return one error for a value that may be of several kinds, and is of none.

    Pydantic tells of each kind.  What is wrong inside of one of them tells more than the others.
    """
    found: list[ErrorDetails] = []
    for field, group in groupby(errors, lambda error: _of_kinds(model, error["loc"])):
        kinds, depth = list(group), len(field)
        inside = [error for error in kinds if field and len(error["loc"]) > depth + 1]
        for error in inside:
            error["loc"] = (*field, *error["loc"][depth + 1 :])
        if field and len(kinds) > 1 and not inside:
            said = [_message(error).removeprefix("Input should be ") for error in kinds]
            one = kinds[0]
            one["loc"], one["msg"], one["type"] = field, f"Input should be {', or '.join(said)}", ""
            inside = [one]
        found += inside or kinds
    return found


def _of_kinds(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the part of `loc` that names the field, if that takes several kinds of values."""
    model, depth = _section_at(model, loc)
    if depth + 1 >= len(loc):  # nothing tells of one of the kinds
        return ()
    inner = _kind(model, loc[depth])
    kinds = [kind for kind in get_args(inner) if kind is not type(None)]
    union = get_origin(inner) in (Union, UnionType) and len(kinds) > 1
    return loc[: depth + 1] if union else ()


def _section_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], int]:
    """Return the innermost section that `loc` leads into, and how many of its parts led there."""
    for depth, part in enumerate(loc):
        inner = _kind(model, part)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return model, depth
        model = inner
    return model, len(loc)


def _kind(model: type[BaseModel], part: int | str) -> Any:
    field = model.model_fields.get(str(part))
    return None if field is None else field.annotation


def _similar(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    section, dot, key = str(loc[-1]).partition(".")
    if dot and len(loc) == 1 and section in model.model_fields:
        return f", only of an override: in a file it is {section}: {{{cut(key)}: ...}}"
    inside = {name: field.annotation for name, field in model.model_fields.items()}
    sections = {k: v for k, v in inside.items() if isinstance(v, type) and issubclass(v, BaseModel)}
    homes = [f"{k}.{section}" for k, v in sections.items() if section in v.model_fields]
    if len(loc) == 1 and homes:
        return f", did you mean {' or '.join(homes)}?"
    model, _ = _section_at(model, loc[:-1])
    close = difflib.get_close_matches(cut(str(loc[-1])), model.model_fields, n=1)
    return (
        f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(model.model_fields)})"
    )


def _used(raw: Mapping[str, Any], named: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the plugins that a config asks for."""
    target = raw.get("target")
    engine = target.get("engine") if isinstance(target, dict) else None
    return frozenset({*map(str, named), *([engine] if isinstance(engine, str) else [])})


def _section(
    model: type[S], value: object, origin: str, prefix: tuple[str, ...], package: str
) -> S:
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin, model, prefix, f"check {package}")) from exc
