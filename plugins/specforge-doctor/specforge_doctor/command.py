"""The command `specforge doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from specforge_core.commands import PATH, config_option, load_run, overrides_argument


@click.command()
@config_option
@click.option("--draft", type=PATH, required=True, help="Run, RUN@best or checkpoint.")
@click.option("--export", type=PATH, required=True, help="What was exported of it.")
@click.option("--format", "format_", help="Format of the export, if it does not say.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@overrides_argument
def doctor(
    config: Path,
    draft: Path,
    export: Path,
    format_: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Check that trainer, reference loop and engine accept alike."""
    run, strategy = load_run(config, overrides)
    from specforge_core.errors import RunError

    from .report import render
    from .run import REPORT, diagnose

    report = diagnose(run, strategy, draft, export, format_)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        from rich.console import Console

        Console().print(render(report))
        click.echo(f"wrote {run.output_dir / REPORT}")
    if not report.verdict.healthy:
        raise RunError(report.verdict.message)
    if not as_json:
        click.echo(report.verdict.message)
