"""`specforge regenerate` from two real servers that die and come back, of a real model.

What is written is what the transformers engine writes, greedily, whichever server answered.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import RegenerateConfig, RunConfig, StrategyConfig, TargetConfig
from specforge_core.data.regenerate import RegenerateReport, regenerate
from specforge_core.strategy import Strategy

TARGET = Path.home() / ".cache/specforge/smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TARGET.exists(),
        reason=f"needs SmolLM2: python examples/quickstart/target.py {TARGET}",
    ),
]
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "What is 7 + 5?",
    "Say hello in Spanish.",
    "Which animal barks?",
    "Give me a word that rhymes with cat.",
    "What do bees make?",
)
FOLLOW_UP = "Why?"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    with path.open("w") as file:
        for number, question in enumerate(QUESTIONS):
            asked = [question, FOLLOW_UP] if number % 3 == 0 else [question]
            messages = [{"role": "user", "content": text} for text in asked]
            file.write(json.dumps({"id": str(number), "messages": messages}) + "\n")
    return path


def run_of(prompts: Path, **target: Any) -> RunConfig:
    settings = {"max_new_tokens": 16, "batch_size": 2, "keep_unfinished": True}
    return RunConfig(
        target=TargetConfig(path=str(TARGET), device="cpu", dtype="float32", **target),
        strategy=StrategyConfig(name="linear"),
        regenerate=RegenerateConfig(prompts=(prompts,), **settings),
    )


def rows(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as lines:  # drawn text may hold what str.splitlines cuts at
        return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def expected(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("expected") / "here.jsonl"
    regenerate(run_of(prompts), Strategy.load("linear"), path)
    return rows(path)


@pytest.fixture(scope="module")
def servers(newest_sglang_python: str, real_server: Any) -> list[Any]:
    """Two that give answers and states, to either engine."""
    return [real_server(newest_sglang_python, TARGET, capture=True) for _ in range(2)]


def wait_until(reached: Callable[[], bool], going: threading.Thread) -> None:
    while not reached():
        assert going.is_alive(), "the run ended before"
        time.sleep(0.02)


@pytest.mark.parametrize("engine", ["openai", "sglang"])
def test_two_servers_that_die_in_turn(
    engine: str,
    servers: list[Any],
    prompts: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second is killed, the first one goes on and is killed too, the second comes back."""
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    first, second = servers
    for server in servers:
        if server.process.poll() is not None:  # the test before ended with it
            server.start()
    for server in servers:
        server.wait()
    options = {"urls": [server.url for server in servers], "patience": 600}
    run = run_of(prompts, engine=engine, options=options)
    output = tmp_path / "there.jsonl"
    reports: list[RegenerateReport] = []
    going = threading.Thread(
        target=lambda: reports.append(regenerate(run, Strategy.load("linear"), output)),
        daemon=True,
    )
    written = lambda: len(output.read_text().splitlines()) if output.exists() else 0  # noqa: E731
    going.start()
    wait_until(lambda: written() >= 2, going)
    second.kill()
    before = written()
    wait_until(lambda: written() > before, going)
    first.kill()
    assert written() < len(QUESTIONS)
    second.start()
    going.join()
    (report,) = reports
    assert (report.num_written, dict(report.dropped)) == (len(QUESTIONS), {})
    found = rows(output)
    for name, row in found.items():
        if row.pop("retokenized", False):  # the server gave text alone, which may have other tokens
            assert engine == "openai"
            del row["token_rows"], expected[name]["token_rows"]
    assert found == expected
    told = capsys.readouterr().err
    assert all(f"{server.url} failed" in " ".join(told.split()) for server in servers)
