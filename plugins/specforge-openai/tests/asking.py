"""A target engine of servers, and what a test asks of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from specforge_openai.engine import OpenAIEngine

from specforge_core.config import (
    DataConfig,
    RegenerateConfig,
    RunConfig,
    StrategyConfig,
    TargetConfig as Target,
)
from specforge_core.data.regenerate import RegenerateReport, regenerate as run_regenerate
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import toy_tokenizer
from specforge_core.types import Generated, GenerateOptions, Prompt

TOKENIZER = toy_tokenizer()
EOS = TOKENIZER.eos_token_id


def served(target: Path, *found: Any, **options: Any) -> Target:
    given = {"urls": [server.url for server in found], "patience": 0.0, **options}
    given = {name: value for name, value in given.items() if value is not None}  # not set
    return Target(path=str(target), device="cpu", dtype="float32", engine="openai", options=given)


def make_prompts(*texts: str) -> list[Prompt]:
    rows = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in texts]
    return [
        Prompt(index=i, input_ids=row, loss_mask=torch.zeros_like(row))
        for i, row in enumerate(rows)
    ]


def ask(engine: OpenAIEngine, *texts: str, **options: Any) -> list[Generated]:
    settings = {"max_new_tokens": 24, "eos": frozenset({EOS}), "batch_size": 4, **options}
    found = engine.generate(make_prompts(*texts), GenerateOptions(**settings))
    return sorted(found, key=lambda answer: answer.index)


def text_of(answer: Generated) -> str:
    return str(TOKENIZER.decode(list(answer.tokens)))


def make_run(
    target: Path,
    *found: Any,
    data: dict[str, Any] | None = None,
    patience: float = 0.0,
    **options: Any,
) -> RunConfig:
    return RunConfig(
        target=served(target, *found, patience=patience),
        strategy=StrategyConfig(name="linear"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(**{"max_new_tokens": 24, "batch_size": 4, **options}),
    )


def regenerate(run: RunConfig, output: Path) -> RegenerateReport:
    return run_regenerate(run, Strategy.load("linear"), output)


def write(path: Path, count: int) -> Path:
    said = [[{"role": "user", "content": "x" * (1 + i)}] for i in range(count)]
    rows = [json.dumps({"id": str(i), "messages": said[i]}) + "\n" for i in range(count)]
    path.write_text("".join(rows))
    return path
