"""The commands that show what runs have logged."""

from __future__ import annotations

from pathlib import Path

import click

from ..commands import PATH


@click.command()
@click.argument("output_dir", type=PATH)
@click.option(
    "--every",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
def watch(output_dir: Path, every: float) -> None:
    """Show a run's loss, acceptance, throughput and phases until it ends.

    On a terminal the charts are redrawn; elsewhere an update is a line.
    """
    from rich.console import Console

    from .watch import watch as run_watch

    run_watch(output_dir, every, Console())


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o",
    "--output",
    type=PATH,
    default="plot.png",
    show_default=True,
    help="Picture to write: .png, .pdf, .svg ...",
)
def plot(runs: tuple[Path, ...], output: Path) -> None:
    """Compare what runs have logged in one picture.

    RUN is an output_dir, or a metrics.jsonl. A run that goes on is drawn as far as it is.
    """
    from .compare import plot_runs

    plot_runs(runs, output)
    click.echo(f"wrote {output}")
