"""The `specforge` command.  Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import click

from .commands import CONFIG_HELP, PATH, Commands, config_option, load_run, overrides_argument
from .errors import LONGEST, SpecForgeError
from .text import cut


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

    With --deep, KEY=VALUE arguments such as strategy.num_layers=1 are options of the strategy.
    """
    from .listing import check as run_check

    for line in run_check(name):
        click.echo(line)
    if deep or overrides:
        from .deep import check_deep

        check_deep(name, overrides)
        click.echo(f"{name}: passes the suite of every strategy")


@cli.command()
@click.argument("name")
@click.option("--kind", default="method", show_default=True, help="What to begin: a template.")
@click.option("-o", "--output", type=PATH, help="Directory to write; else specforge-NAME.")
def new(name: str, kind: str, output: Path | None) -> None:
    """Write a package that works, to begin a method from."""
    from .new import write_package

    directory = output or Path(f"specforge-{name}")
    written = write_package(name, kind, directory)
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


@cli.command()
@config_option
@overrides_argument
def capture(config: Path, overrides: tuple[str, ...]) -> None:
    """Store hidden states for offline training; resumes."""
    run, strategy = load_run(config, overrides)
    from .capture.job import run_capture

    manifest = run_capture(run, strategy)
    click.echo(
        f"{manifest.num_samples} samples, {manifest.num_tokens} tokens, "
        f"{manifest.num_skipped} skipped in {run.data.capture_dir}"
    )


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
    """Check a capture; with -c capture some again and compare."""
    run, strategy = load_run(config, overrides) if config is not None else (None, None)
    from .capture.verify import verify_directory

    click.echo(str(verify_directory(directory, run, strategy, recapture)))


@cli.command()
@config_option
@click.option("--plan", is_flag=True, help="Print what would be done, and do nothing.")
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
    run, strategy = load_run(config, overrides)
    if plan:
        from .train.plan import plan_run

        click.echo(plan_run(run, strategy, nproc))
        return
    if nproc > 1 and "RANK" not in os.environ:
        from .train.dist import relaunch

        relaunch(nproc, ["train", "-c", str(config), *overrides])
    from .train.run import train as run_train

    report = run_train(run, strategy)
    if os.environ.get("RANK", "0") == "0":
        done = "finished" if report.finished else "stopped"
        click.echo(
            f"{done} at step {report.step}/{report.total_steps}: {report.num_tokens} tokens in "
            f"{report.seconds:.0f} s, checkpoint {report.checkpoint}"
        )


@cli.command("eval")
@config_option
@click.option("--draft", type=PATH, required=True, help="Run, checkpoint or export.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@overrides_argument
def evaluate(config: Path, draft: Path, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Measure acceptance by lossless speculative decoding."""
    run, strategy = load_run(config, overrides)
    from .drafts.load import restore
    from .evaluate.report import render
    from .evaluate.run import evaluate as run_evaluate

    report = run_evaluate(run, strategy, restore(run, strategy, draft).draft)
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from rich.console import Console

    Console().print(render(report))


@cli.command()
@click.option("--checkpoint", type=PATH, required=True, help="Checkpoint or run directory.")
@click.option("--format", "format_", default="hf", show_default=True, help="hf, sglang, vllm ...")
@click.option("-o", "--output", type=PATH, required=True, help="Directory to write.")
@click.option("--force", is_flag=True, help="Replace an earlier export.")
def export(checkpoint: Path, format_: str, output: Path, force: bool) -> None:
    """Write a trained draft in an engine's layout."""
    from .drafts.load import export_checkpoint

    click.echo(f"wrote {export_checkpoint(checkpoint, format_, output, force=force)}")


def main() -> None:
    """Run the command and end the process with its status."""
    status = 1
    atexit.register(lambda: _skip_teardown(status))  # the first one registered is called last
    status = _run()
    sys.exit(status)


def _run() -> int:
    """Run the command; turn errors into one message and an exit status."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not sys.stderr.isatty():  # in a log the libraries' bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # before torch loads OpenMP: a pool that waits must not spin on the other one's cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rank = os.environ.get("RANK")
    prefix = "error: " if rank is None else f"error (rank {rank}): "
    try:
        asked: object = cli.main(args=arguments, prog_name="specforge", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SystemExit as exc:
        if exc.code is not None and not isinstance(exc.code, int):
            click.echo(f"{prefix}{exc.code}", err=True)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except Exception as exc:
        if debug:
            raise
        if isinstance(exc, SpecForgeError):
            click.echo(f"{prefix}{exc}", err=True)
            return exc.exit_code
        kind = type(exc).__name__
        reason = cut(str(exc), LONGEST)
        click.echo(f"{prefix}{kind}: {reason}\nAdd --debug to see where it came from", err=True)
        return 1
    return asked if isinstance(asked, int) else 0  # of ctx.exit(STATUS), which main() returns


def _skip_teardown(status: int) -> None:
    """End a process that used torch, before Python is torn down around threads that still run.

    One that comes back from an operation of torch at that time makes the process abort (pytorch
    issue 38228).  torch's caches keep process groups, and so their threads, whatever is destroyed.
    """
    if "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
