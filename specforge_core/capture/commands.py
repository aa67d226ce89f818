"""The command that captures."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..commands import config_option, load_run, overrides_argument
from ..errors import ConfigError
from ..text import counted, in_units

if TYPE_CHECKING:
    from .job import Job


@click.command()
@config_option
@click.option("--estimate", is_flag=True, help="Capture a little, say what all takes; store none.")
@click.option("--yes", is_flag=True, help="Begin also what the disk has no room for.")
@overrides_argument
def capture(config: Path, estimate: bool, yes: bool, overrides: tuple[str, ...]) -> None:
    """Store hidden states for offline training; resumes."""
    run, strategy = load_run(config, overrides)
    if estimate:
        from ..yaml_text import dump
        from .estimate import estimate as run_estimate

        click.echo(dump({"estimate": asdict(run_estimate(run, strategy))}))
        return
    from .job import run_capture

    manifest = run_capture(run, strategy, None if yes else _ask)
    click.echo(
        f"{counted(manifest.num_samples, 'sample')}, {counted(manifest.num_tokens, 'token')}, "
        f"{manifest.num_skipped} skipped in {run.data.capture_dir}"
    )


def _ask(job: Job, samples: int, tokens: int) -> None:
    """Let the user decide, where what is left to capture does not fit on the disk.

    Raises ConfigError where nobody can be asked, and click's Abort for a no.
    """
    from .estimate import Size, free_bytes
    from .job import capture_directory

    directory = capture_directory(job.run)
    need, free = Size.of(job.adapter.spec).total(samples, tokens), free_bytes(directory)
    if need <= free:
        return
    told = (
        f"{tokens} tokens that are not captured yet take {in_units(need)} in {directory}, where "
        f"{in_units(free)} are free"
    )
    if not on_terminal():
        raise ConfigError(
            f"{told}. Make room, train online, or try: fewer of them with data.limit=N, "
            "data.capture_dir=DIR on another disk, or --yes to begin all the same"
        )
    click.confirm(f"{told}. Begin all the same?", abort=True, err=True)


def on_terminal() -> bool:
    """Say whether there is somebody to answer."""
    return sys.stdin.isatty()
