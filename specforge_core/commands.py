"""Commands of packages beside the core's own, and what a package's command shares with them.

A package names a click command in the group `specforge.commands`.  It is
imported when it is called or its own help is asked for; `specforge --help`
shows the summary of its distribution.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import PluginError
from .process import importing

if TYPE_CHECKING:
    from .config import RunConfig
    from .plugins import Installed
    from .strategy import Strategy

GROUP = "specforge.commands"  # as in plugins.py, which is not imported to list


class _Path(click.Path):
    """A path; `~` is the user's folder also where no shell said so, as in `--draft=~/run`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from .section import fits

        try:
            fits(os.fsdecode(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        given = os.fsdecode(super().convert(value, param, ctx))
        return Path(os.path.expanduser(given))  # noqa: PTH111  # leaves names of nobody as they are


PATH = _Path(path_type=Path)
CONFIG_HELP = "YAML file of the run; KEY=VALUE arguments override it."
config_option = click.option("-c", "--config", type=PATH, required=True, help=CONFIG_HELP)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def load_run(config: Path, overrides: tuple[str, ...]) -> tuple[RunConfig, Strategy]:
    """Load what `-c` and the overrides of a command say, before it imports anything heavy."""
    with importing():
        from .cpu import use_threads
        from .load import load_config

        use_threads()
        return load_config(config, overrides)


class Commands(click.Group):
    """The core's commands in the order a user meets them, then those of packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names; imports no package."""
        return [*self.commands, *sorted(_summaries().keys() - self.commands.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; of a package's only its name and summary."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        summary = _summaries().get(cmd_name)
        return None if summary is None else click.Command(cmd_name, short_help=summary)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called; this imports a package's."""
        if args[0] not in self.commands:
            from .plugins import COMMANDS, discover

            if found := discover(COMMANDS).get(args[0]):
                return args[0], load_command(found), args[1:]
        return super().resolve_command(ctx, args)


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


@functools.cache
def _summaries() -> dict[str, str]:
    """Return the summary of each command's distribution.

    For lists only, and read by hand: importing importlib.metadata would cost half of a start.
    """
    found: dict[str, str] = {}
    for directory in dict.fromkeys(sys.path):
        for info in Path(directory).glob("*.dist-info"):
            for name in _entry_points(info):
                found.setdefault(name, _summary(info))
    return found


def _entry_points(info: Path) -> list[str]:
    try:
        lines = (info / "entry_points.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    names, inside = [], False
    for line in map(str.strip, lines):
        if line.startswith("["):
            inside = line == f"[{GROUP}]"
        elif inside and "=" in line:
            names.append(line.partition("=")[0].strip())
    return names


def _summary(info: Path) -> str:
    with suppress(OSError), (info / "METADATA").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Summary:"):
                return line.partition(":")[2].strip()
            if not line.strip():
                break
    return f"Of the package {info.name.partition('-')[0]}."
