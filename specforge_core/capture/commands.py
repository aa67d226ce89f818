"""The command that captures."""

from __future__ import annotations

from pathlib import Path

import click

from ..commands import config_option, load_run, overrides_argument


@click.command()
@config_option
@overrides_argument
def capture(config: Path, overrides: tuple[str, ...]) -> None:
    """Store hidden states for offline training; resumes."""
    run, strategy = load_run(config, overrides)
    from .job import run_capture

    manifest = run_capture(run, strategy)
    click.echo(
        f"{manifest.num_samples} samples, {manifest.num_tokens} tokens, "
        f"{manifest.num_skipped} skipped in {run.data.capture_dir}"
    )
