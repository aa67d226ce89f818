"""From a YAML file and overrides to a validated config and its strategy.

Two passes: `strategy.name` picks the plugin, whose own model then validates the
`strategy:` section; likewise those of `plugins`; the core validates the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .config import RunConfig, Section
from .errors import ConfigError
from .plugins import PLUGINS, discover
from .records import MASK, in_error, override_in_error
from .strategy import Strategy

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
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read: {exc.strerror}. Try: -c PATH"
        ) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not valid YAML: {exc}") from exc
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
    named = raw.get("plugins") or {}
    if not isinstance(named, dict):
        raise ConfigError(f"{origin}: plugins must hold a section by plugin, got {named!r:.80}")
    strategy = Strategy.load(name, using=_used(raw, named))
    chosen = _section(strategy.config(), section, origin, ("strategy",))
    models = strategy.plugin_configs()
    if unknown := sorted(named.keys() - models.keys()):
        known = ", ".join(sorted(discover(PLUGINS))) or "none"
        raise ConfigError(
            f"{origin}: plugins.{unknown[0]}: no installed plugin has this section (installed: "
            f"{known}). `specforge plugins` lists them. Try: pip install specforge-{unknown[0]}"
        )
    sections = {
        key: _section(models[key], value or {}, origin, ("plugins", key))
        for key, value in named.items()
    }
    try:
        whole = {**raw, "strategy": chosen, "plugins": sections}
        return RunConfig.model_validate(whole), strategy
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin, RunConfig)) from exc


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set what `KEY=VALUE` says, with dots between the parts of KEY, in a config mapping."""
    key, equals, text = override.partition("=")
    override = override_in_error(override)
    *parents, last = key.split(".")
    if not equals or not last:
        raise ConfigError(f"override {override!r} is not KEY=VALUE. Try: train.max_steps=100")
    try:
        value = yaml.safe_load(text)
        if isinstance(value, str) and text[:1] in "0123456789.+-":
            value = _number(value)  # YAML 1.1 reads 1e-4 as text; a person means the number
    except yaml.YAMLError as exc:
        why = "" if MASK in override else f": {exc}"  # which shows the text
        raise ConfigError(f"override {override!r}: the value is not valid YAML{why}") from exc
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a section")
    node[last] = value


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _explain(
    exc: ValidationError, origin: str, model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> str:
    lines = []
    for error in exc.errors(include_url=False):
        where = ".".join(str(part) for part in (*prefix, *error["loc"]))
        if error["type"] == "extra_forbidden":
            hint = _similar(model, error["loc"])
            lines.append(f"{where}: unknown key{hint}")
        elif error["type"] == "missing":
            lines.append(f"{where}: required, and missing")
        else:
            message = error["msg"].removeprefix("Value error, ")
            lines.append(
                f"{where}: {message}, got {in_error(error['input'], where)!r}" if where else message
            )
    listing = "\n  ".join(lines)
    return f"{origin} is not a valid config:\n  {listing}\nTry: specforge config"


def _similar(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field is not None else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    close = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1)
    return (
        f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(model.model_fields)})"
    )


def _used(raw: Mapping[str, Any], named: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the plugins that a config asks for."""
    target = raw.get("target")
    engine = target.get("engine") if isinstance(target, dict) else None
    return frozenset({*map(str, named), *([engine] if isinstance(engine, str) else [])})


def _section(model: type[S], value: object, origin: str, prefix: tuple[str, ...]) -> S:
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, origin, model, prefix=prefix)) from exc
