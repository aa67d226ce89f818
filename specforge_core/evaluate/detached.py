"""The process of an evaluation beside a training: `python -m` this, the config on its stdin."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from ..commands import PATH
from ..cpu import use_threads
from ..drafts.load import restore
from ..files import write_file
from ..load import validate
from ..process import run as run_command
from ..target.info import load_target_info
from ..target.tokenizer import load_tokenizer
from .report import as_metrics
from .run import load_prompt_sets, measure, open_target


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH)
def evaluate(checkpoint: Path, output: Path) -> None:
    """Decode the prompts of a run with one of its checkpoints, and write the report."""
    use_threads()
    run, strategy = validate(json.load(sys.stdin), "the config of the run")
    draft = restore(run, strategy, checkpoint).draft
    tokenizer = load_tokenizer(run.target)
    sets = load_prompt_sets(run, strategy, tokenizer, load_target_info(run.target))
    with open_target(run, strategy) as (engine, spec, limits):
        report = measure(run, strategy, draft, sets, engine, spec, limits, quiet=True)
    found = {"metrics": as_metrics(report), **asdict(report)}
    write_file(output, json.dumps(found, indent=2, allow_nan=False).encode() + b"\n")


if __name__ == "__main__":
    run_command(evaluate)
