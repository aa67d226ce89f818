"""`specforge regenerate` from a stock SGLang server writes what it writes in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge_core.config import RegenerateConfig, RunConfig, StrategyConfig, TargetConfig
from specforge_core.data.regenerate import RegenerateReport, regenerate as run_regenerate
from specforge_core.errors import ConfigError
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import save_toy_target, toy_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that writes letters, and ends about one answer in two within 40 tokens."""
    path = tmp_path_factory.mktemp("target") / "talker"
    save_toy_target(path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = toy_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "abcdefghijklmnopqrstuvwxyzĠ,.?"]
    ends = [int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")  # special, but no end
    with torch.no_grad():
        kept = torch.zeros(len(tokenizer), 1)
        kept[letters] = 1
        kept[[*ends, start]] = 1.2
        model.lm_head.weight.mul_(kept)
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ends, "repetition_penalty": 3.0, "temperature": 0.6})
    )
    return path


@pytest.fixture(scope="module")
def url(sglang_python: str, talker: Path, real_server: Any) -> str:
    server = real_server(sglang_python, talker)
    server.wait()
    return str(server.url)


def make_run(
    target: Path, prompts: Path, url: str | None = None, engine: str = "openai", **options: Any
) -> RunConfig:
    settings = {"max_new_tokens": 40, "batch_size": 8, **options}
    served = {"engine": engine, "options": {"urls": [url]}} if url else {}
    return RunConfig(
        target=TargetConfig(path=str(target), device="cpu", dtype="float32", **served),
        strategy=StrategyConfig(name="linear"),
        regenerate=RegenerateConfig(prompts=(prompts,), **settings),
    )


def regenerate(run: RunConfig, output: Path) -> RegenerateReport:
    return run_regenerate(run, Strategy.load("linear"), output)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    with path.open("w") as file:
        for i in range(20):
            turns = [f"question {i}, " + "word " * (i % 5), "and more?"][: 1 + i % 2]
            messages = [{"role": "user", "content": turn} for turn in turns]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    return path


def rows(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as lines:  # drawn text may hold what str.splitlines cuts at
        return {row["id"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("keep", [False, True])
def test_greedy_answers_are_those_of_this_process(
    url: str, talker: Path, prompts: Path, tmp_path: Path, keep: bool
) -> None:
    """Texts, ends, what is dropped, and the tokens counted."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    local = regenerate(make_run(talker, prompts, keep_unfinished=keep), here)
    served = regenerate(make_run(talker, prompts, keep_unfinished=keep, url=url), there)
    found = rows(there)
    # an older server gives no token ids: they are made of the text, which the rows say
    assert len({row.pop("retokenized", False) for row in found.values()}) == 1
    assert found == rows(here)
    assert served.dropped == local.dropped
    assert served.num_tokens == local.num_tokens
    assert served.num_written > 4
    assert (served.num_written == 20) if keep else ("unfinished" in served.dropped)
    assert keep is False or "<|im_start|>" in there.read_text()
    again = regenerate(make_run(talker, prompts, keep_unfinished=keep, url=url), there)
    assert (again.num_before, again.num_tokens) == (20, 0)


def test_sampled_answers(url: str, talker: Path, prompts: Path, tmp_path: Path) -> None:
    run = make_run(talker, prompts, url=url, temperature=1.0, top_p=0.9, keep_unfinished=True)
    report = regenerate(run, tmp_path / "sampled.jsonl")
    # random weights may draw the end, or only spaces, first: then there is no answer to write
    assert set(report.dropped) <= {"empty"}
    assert report.num_written == 20 - report.dropped["empty"] > 10
    regenerate(make_run(talker, prompts, url=url, keep_unfinished=True), tmp_path / "greedy.jsonl")
    greedy = rows(tmp_path / "greedy.jsonl")
    assert any(
        row["messages"] != greedy[name]["messages"]
        for name, row in rows(tmp_path / "sampled.jsonl").items()
    )


def test_a_server_of_another_model_is_refused(
    url: str, talker: Path, prompts: Path, toy_target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{url} serves '.*talker', the target is"):
        regenerate(make_run(toy_target, prompts, url=url), tmp_path / "out.jsonl")
