"""Prompts in a file, and a run that has them answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specforge_core.config import (
    DataConfig,
    RegenerateConfig,
    RunConfig,
    StrategyConfig,
    TargetConfig as Target,
)
from specforge_core.data.prompts import PromptSet, open_prompts
from specforge_core.data.regenerate import RegenerateReport, regenerate as run_regenerate
from specforge_core.data.sources import Rows
from specforge_core.strategy import Strategy


def regenerate(run: RunConfig, output: Path) -> RegenerateReport:
    return run_regenerate(run, Strategy.load("linear"), output)


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def ask(name: str, *questions: str, **metadata: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question} for question in questions]
    return {"id": name, "messages": messages, **metadata}


def make_run(
    target: Path, prompts: Path, *, data: dict[str, Any] | None = None, **options: Any
) -> RunConfig:
    settings = {"max_new_tokens": 24, "batch_size": 4, **options}
    return RunConfig(
        target=Target(path=str(target), device="cpu", dtype="float32"),
        strategy=StrategyConfig(name="linear"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(prompts=(prompts,), **settings),
    )


def lines(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines())


def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    source_rows: Rows,
    **options: Any,
) -> PromptSet:
    """Read and tokenize `data.train` as `open_prompts` opens it."""
    return open_prompts(data, tokenizer, vocab_size, source_rows, **options).load()
