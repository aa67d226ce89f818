"""What is installed: rows for `specforge strategies` and `plugins`, the report of `check`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .commands import Commands, load_command
from .errors import ConfigError, PluginError
from .plugins import (
    COMMANDS,
    OWN_SECTION,
    PLUGINS,
    STRATEGIES,
    Installed,
    Manager,
    core_manager,
    disabled,
    discover,
)
from .text import meant, shorten

if TYPE_CHECKING:
    from pydantic import BaseModel

GROUPS = (STRATEGIES, PLUGINS, COMMANDS)


def list_strategies() -> list[dict[str, str]]:
    """Return name, package, version and state of each installed strategy; imports none."""
    rows = []
    for installed in _sorted(STRATEGIES):
        state, reason = _state(installed)
        rows.append(_row(installed) | {"state": f"{state}: {reason}" if reason else state})
    return rows


def list_plugins(own: Commands) -> list[dict[str, str]]:
    """Return group, name, package, version, state and reason of everything installed.

    `own` has the core's commands.  Imports plugins, as every run does, but no strategy and no
    command.
    """
    rows = []
    for group in GROUPS:
        for installed in _sorted(group):
            state, reason = _state(installed)
            if state == "ok" and group == PLUGINS:
                state, reason = _plugin_state(installed)
            if group == COMMANDS and installed.name in own.commands:
                state, reason = "duplicate", "the core has a command of this name, which is used"
            kind = {"group": group.removeprefix("specforge.")}
            rows.append(kind | _row(installed) | {"state": state, "reason": reason})
    return rows


def _sorted(group: str) -> list[Installed]:
    found = discover(group)
    return [found[name] for name in sorted(found)]


def _row(installed: Installed) -> dict[str, str]:
    return {"name": installed.name, "package": installed.dist, "version": installed.version}


def _state(installed: Installed) -> tuple[str, str]:
    """Return what metadata tells, and why."""
    if problem := installed.problem():
        broken = "broken" if installed.unreadable else "incompatible"
        return "duplicate" if installed.rivals else broken, problem
    module = installed.entry_point.module
    try:
        spec = find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "broken", f"there is no module {module!r}. Try: pip install {installed.dist}"
    return "ok", ""


def _plugin_state(installed: Installed) -> tuple[str, str]:
    """Return what a run would make of a cross-cutting plugin, and why."""
    name = installed.name
    if name in disabled():
        return "disabled", f"SPECFORGE_DISABLE_PLUGINS names it ({', '.join(sorted(disabled()))})"
    try:
        pm = _manager(installed)
    except PluginError as exc:
        return "broken", str(exc)
    if OWN_SECTION in _hooks(pm, name):
        return "off", f"takes part only in runs with a section plugins.{name}"
    return "ok", ""


def _manager(installed: Installed) -> Manager:
    """Load one cross-cutting plugin as a run that names it would, and no other."""
    others = discover(PLUGINS).keys() - {installed.name}
    return core_manager(using=frozenset({installed.name}), disable=others)


def _hooks(pm: Manager, name: str) -> list[str]:
    callers = pm.get_hookcallers(pm.get_plugin(name)) or []
    return sorted(caller.name for caller in callers)


def check(name: str) -> Iterator[str]:
    """Load what is installed as `name` as a run would; yield lines about its hooks and options.

    Raises PluginError for anything a run would trip over.
    """
    found = {group: discover(group) for group in GROUPS}
    if not any(name in names for names in found.values()):
        known = sorted({known for names in found.values() for known in names})
        told = "did you mean {0!r}? Try: specforge check {0}"
        hint = meant(name, known, told, "`specforge plugins` lists what is. ")
        raise PluginError(
            f"strategy {shorten(name)} is not installed, and no plugin or command has that name: "
            f"{hint}"
        )
    if name in found[STRATEGIES]:
        yield from check_strategy(name)
    if name in found[PLUGINS]:
        yield from _check_plugin(found[PLUGINS][name])
    if name in found[COMMANDS]:
        yield from _check_command(found[COMMANDS][name])


def check_strategy(name: str) -> Iterator[str]:
    """Load one strategy; yield lines about its hooks and options.  Raises PluginError."""
    from .strategy import Strategy

    strategy = Strategy.load(name)
    model = strategy.config()
    yield f"{name}: ok ({strategy.package})"
    yield f"hooks: {', '.join(_hooks(strategy.pm, name))}"
    yield from _options("strategy", model)


def _check_plugin(installed: Installed) -> Iterator[str]:
    from .strategy import Strategy

    name = installed.name
    if name in disabled():
        raise PluginError(
            f"{installed} is disabled: SPECFORGE_DISABLE_PLUGINS names it. "
            "Try: unset SPECFORGE_DISABLE_PLUGINS"
        )
    pm = _manager(installed)
    models = Strategy(name, f"{installed.dist} {installed.version}", pm).plugin_configs()
    yield f"{name}: ok (plugin of {installed.dist} {installed.version})"
    yield f"hooks: {', '.join(_hooks(pm, name))}"
    if name in models:
        yield f"off unless a run has the section plugins.{name} (plugins.{name}={{}})"
        yield from _options(f"plugins.{name}", models[name])


def _check_command(installed: Installed) -> Iterator[str]:
    import click

    command = load_command(installed)
    yield f"{installed.name}: ok (command of {installed.dist} {installed.version})"
    with click.Context(command, info_name=f"specforge {installed.name}") as context:
        yield command.get_help(context)


def list_options(section: str | None) -> Iterator[str]:
    """Yield the options of the run config: of one section, or of all.

    Raises ConfigError for a section that there is not.
    """
    from .config import RunConfig, Section

    sections: dict[str, type[BaseModel]] = {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    del sections["strategy"]  # every strategy has its own
    if section is not None and section not in sections:
        raise ConfigError(
            f"{section!r} is no section of the core's (known: {', '.join(sections)}). The options "
            "of strategy and plugins are their packages': specforge check NAME"
        )
    for name, model in sections.items():
        if section in (None, name):
            yield from _options(name, model)
    if section is None:
        yield "options of strategy and plugins.NAME: specforge check NAME prints them"
        output = RunConfig.model_fields["output_dir"]
        yield f"output_dir: path = {str(output.default)!r}  {output.description}"


def _options(section: str, model: type[BaseModel]) -> Iterator[str]:
    from pydantic_core import PydanticUndefined

    doc = inspect.getdoc(model) or ""
    yield f"options of {section}: ({doc.splitlines()[0] if doc else model.__name__})"
    for option, field in model.model_fields.items():
        default: Any = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else repr(default)
        kind = inspect.formatannotation(field.annotation)
        yield f"  {option}: {kind} = {shown}  {field.description or ''}".rstrip()
