"""The `specforge` command.  Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import click

from . import stop
from .capture.commands import capture
from .commands import CONFIG_HELP, PATH, Commands, config_option, load_run, overrides_argument
from .errors import ConfigError
from .evaluate.commands import plot, watch
from .process import importing, run


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="specforge-core")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (allowed anywhere).")
def cli(debug: bool) -> None:
    """Train draft models for speculative decoding.

    \b
    A first run:   specforge train -c run.yaml
    then:          specforge eval -c run.yaml --draft OUTPUT_DIR
    """


@cli.result_callback()
def _forget(result: object, debug: bool) -> None:
    """Drop what a command returned: only `ctx.exit(STATUS)` sets the status."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def strategies(as_json: bool) -> None:
    """List the installed strategies."""
    from .listing import list_strategies

    rows = list_strategies()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("no strategy is installed. Try: pip install specforge-NAME")
    for row in rows:
        click.echo(f"{row['name']:<16} {row['package']} {row['version']:<10} {row['state']}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List strategies, plugins and commands, and what is wrong with them."""
    from .listing import list_plugins

    rows = list_plugins(cli)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        package = f"{row['package']} {row['version']}"
        state = f"{row['state']}: {row['reason']}" if row["reason"] else row["state"]
        click.echo(f"{row['group']:<11} {row['name']:<16} {package:<26} {state}")


@cli.command()
@click.argument("name")
@click.option("--deep", is_flag=True, help="Also run the suite that every strategy has to pass.")
@overrides_argument
def check(name: str, deep: bool, overrides: tuple[str, ...]) -> None:
    """Check one strategy, plugin or command as a run would, print its options.

    With target.path=DIR it is checked on that target, which is loaded; KEY=VALUE arguments such as
    strategy.num_layers=1 are options of the strategy.
    """
    from .listing import check as run_check

    for line in run_check(name):
        click.echo(line)
    on_target = any(override.startswith("target.") for override in overrides)
    if on_target:
        from .capture.job import check_target
        from .deep import run_of

        click.echo(check_target(*run_of(name, overrides)))
    if deep or (overrides and not on_target):
        from .deep import check_deep

        check_deep(name, overrides)
        click.echo(f"{name}: passes the suite of every strategy")


@cli.command()
@click.argument("name")
@click.option("--kind", default="method", show_default=True, help="What to begin: a template.")
@click.option("--of", help="Of a variant: the installed method whose hooks it imports.")
@click.option("-o", "--output", type=PATH, help="Directory to write; else specforge-NAME.")
@overrides_argument
def new(
    name: str, kind: str, of: str | None, output: Path | None, overrides: tuple[str, ...]
) -> None:
    """Write a package that works, to begin from: a method, a variant, an engine, a tracker.

    strategy.KEY=VALUE are options of a variant's method that suit a toy target, for its tests.
    """
    from .new import write_package

    directory = output or Path(f"specforge-{name}")
    written = write_package(name, kind, directory, of, overrides)
    click.echo(f"wrote {len(written)} files to {directory}. Try: pip install -e {directory}")


@cli.command()
@click.argument("section", required=False)
def config(section: str | None) -> None:
    """Print every option of the run config, or those of one SECTION."""
    from .listing import list_options

    for line in list_options(section):
        click.echo(line)


@cli.command()
@config_option
@click.option("-o", "--output", type=PATH, required=True, help="JSONL file to write.")
@overrides_argument
def regenerate(config: Path, output: Path, overrides: tuple[str, ...]) -> None:
    """Let the target answer prompts itself; resumes."""
    run, strategy = load_run(config, overrides)
    from .data.regenerate import regenerate as run_regenerate

    report = run_regenerate(run, strategy, output)
    click.echo(str(report))
    report.check(run)


@cli.command()
@config_option
@click.option("--show", type=click.IntRange(0, 1000), default=0, help="Print the first rows, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@overrides_argument
def data(config: Path, show: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Report what would be trained on: counts, lengths, and rows with what is supervised."""
    if show and as_json:
        raise ConfigError("--json prints the numbers alone. Take --show or --json out")
    run, strategy = load_run(config, overrides)
    from .data.report import report_data

    report = report_data(run, strategy)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    click.echo(str(report))
    report.show(show)


cli.add_command(capture)


@cli.command()
@click.argument("directory", type=PATH)
@click.option("-c", "--config", type=PATH, help=CONFIG_HELP)
@click.option(
    "--recapture",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Samples captured again with -c.",
)
@overrides_argument
def verify(
    directory: Path, config: Path | None, recapture: int, overrides: tuple[str, ...]
) -> None:
    """Check a capture; with -c capture some again and compare.

    Of a run, checkpoint or export the checksums are compared; of a directory of several, all.
    """
    if config is None and overrides:
        raise ConfigError(f"{overrides[0]!r:.80} changes a config, and there is none. Try: -c PATH")
    run, strategy = load_run(config, overrides) if config is not None else (None, None)
    from .drafts.verify import verify as verify_all

    for line in verify_all(directory, run, strategy, recapture):
        click.echo(line)


@cli.command()
@config_option
@click.option("--plan", is_flag=True, help="Measure a few steps, print a plan; write nothing.")
@click.option(
    "--nproc",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Processes to train with.",
)
@overrides_argument
def train(config: Path, plan: bool, nproc: int, overrides: tuple[str, ...]) -> None:
    """Train a draft, offline or online; resumes.

    `specforge config` prints every option of the config.
    """
    if nproc > 1 and not plan and "RANK" not in os.environ:
        from .train.launch import launch

        # the config is for the ranks to read: what it names takes seconds to import, in each
        debug = ["--debug"] if "--debug" in sys.argv else []
        arguments = [*debug, "train", "-c", str(config), *overrides]
        click.get_current_context().exit(launch(nproc, arguments))
    run, strategy = load_run(config, overrides)
    if plan:
        from .train.plan import plan_run

        click.echo(plan_run(run, strategy, nproc, measure=True))
        return
    with importing():
        from .train.run import train as run_train

    report = run_train(run, strategy)
    if os.environ.get("RANK", "0") == "0":
        done = "finished" if report.finished else "stopped"
        then = "" if report.finished else f". {stop.AGAIN}"
        if report.step > report.total_steps:
            then = ". It was beyond that before, so nothing was trained. Raise train.max_steps"
        click.echo(
            f"{done} at step {report.step}/{report.total_steps}: {report.num_tokens} tokens in "
            f"{report.seconds:.0f} s, checkpoint {report.checkpoint}{then}"
        )
    if not report.finished:  # by a signal; another rank's if none came here
        click.get_current_context().exit(128 + (stop.asked() or signal.SIGTERM))


cli.add_command(watch)
cli.add_command(plot)


@cli.command("eval")
@config_option
@click.option("--draft", type=PATH, required=True, help="Run, RUN@best, checkpoint or export.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@overrides_argument
def evaluate(config: Path, draft: Path, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Measure acceptance by lossless speculative decoding."""
    run, strategy = load_run(config, overrides)
    from .drafts.load import restore
    from .evaluate.report import render
    from .evaluate.run import PLOT, REPORT, evaluate as run_evaluate

    report = run_evaluate(run, strategy, restore(run, strategy, draft).draft, draft)
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from rich.console import Console

    Console().print(render(report))
    click.echo(f"wrote {run.output_dir / REPORT} and {run.output_dir / PLOT}")


@cli.command()
@click.option("-c", "--config", type=PATH, help=f"{CONFIG_HELP} Else as the checkpoint says.")
@click.option("--checkpoint", type=PATH, required=True, help="Checkpoint, run or RUN@best.")
@click.option("--format", "format_", default="hf", show_default=True, help="hf, sglang, vllm ...")
@click.option("-o", "--output", type=PATH, required=True, help="Directory to write.")
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@overrides_argument
def export(
    config: Path | None,
    checkpoint: Path,
    format_: str,
    output: Path,
    force: bool,
    overrides: tuple[str, ...],
) -> None:
    """Write a trained draft in an engine's layout.

    KEY=VALUE arguments say what is otherwise than in training: target.path, where it lies now.
    """
    asked = None if config is None else load_run(config, overrides)
    from .drafts.load import export_checkpoint
    from .drafts.served import after_export

    written = export_checkpoint(
        checkpoint, format_, output, force=force, asked=asked, overrides=overrides
    )
    click.echo(after_export(written, format_))


def main() -> None:
    """Run the command and end the process with its status."""
    run(cli)


if __name__ == "__main__":
    main()
