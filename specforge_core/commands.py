"""Commands of packages beside the core's own, and what a package's command shares with them.

A package names a click command in the group `specforge.commands`.  It is
imported when it is called or its own help is asked for; `specforge --help`
shows the summary of its distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import PluginError

if TYPE_CHECKING:
    from .config import RunConfig
    from .plugins import Installed
    from .strategy import Strategy

PATH = click.Path(path_type=Path)
CONFIG_HELP = "YAML file of the run; KEY=VALUE arguments override it."
config_option = click.option("-c", "--config", type=PATH, required=True, help=CONFIG_HELP)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def load_run(config: Path, overrides: tuple[str, ...]) -> tuple[RunConfig, Strategy]:
    """Load what `-c` and the overrides of a command say, before it imports anything heavy."""
    from .cpu import use_threads
    from .load import load_config

    use_threads()
    return load_config(config, overrides)


class Commands(click.Group):
    """The core's commands in the order a user meets them, then those of packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names; imports no package."""
        return [*self.commands, *sorted(_installed().keys() - self.commands.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; of a package's only what its metadata says."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        found = _installed().get(cmd_name)
        return None if found is None else Listed(found)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called; this imports a package's."""
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, Listed):
            command = load_command(command.installed)
        return name, command, rest


class Listed(click.Command):
    """A package's command, not imported."""

    def __init__(self, installed: Installed) -> None:
        super().__init__(installed.name, short_help=_summary(installed))
        self.installed = installed


def load_command(installed: Installed) -> click.Command:
    """Import a package's command.  Raises PluginError for a broken one."""
    from .plugins import load

    found = load(installed)
    if not isinstance(found, click.Command):
        raise PluginError(
            f"{installed}: {installed.entry_point.value!r} holds {type(found).__name__}, and an "
            "entry point of specforge.commands names a click command. "
            f"Try: pip install -U {installed.dist}"
        )
    return found


def _installed() -> dict[str, Installed]:
    from .plugins import COMMANDS, discover

    return discover(COMMANDS)


def _summary(installed: Installed) -> str:
    if installed.problem():
        return f"Cannot be run: specforge check {installed.name}"
    dist = installed.entry_point.dist
    metadata: Any = dist.metadata if dist is not None else {}
    return metadata.get("Summary") or f"Of the package {installed.dist}."
