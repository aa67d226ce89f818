"""`evaluate` from config to files, with a strategy found through its entry point."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import RunConfig
from specforge_core.errors import ConfigError, DataError, SpecForgeError
from specforge_core.evaluate.report import EvalReport
from specforge_core.evaluate.run import (
    evaluate,
    first_turn,
    keep_earlier,
    load_prompt_sets,
    open_target,
)
from specforge_core.load import validate
from specforge_core.strategy import Strategy
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import save_toy_target, write_conversations

# drafts what followed the last token when it was seen before, at every length asked for
REPEATER = """
import torch
from torch import nn
from specforge_core import hookimpl
from specforge_core.types import CaptureSpec, Draft, Field, Proposal

class Adapter:
    fields = {"input_ids": Field(shape=(None,), dtype="int64")}
    spec = CaptureSpec(layers=(0, 4), final="post_norm", fields=fields)
    def __call__(self, capture):
        return {"input_ids": capture.input_ids}

class Repeater:
    max_tokens = 4
    def __init__(self, draft):
        assert not draft.model.training
        self.dtype = draft.model.weight.dtype
    def start(self, prefix):
        assert sorted(prefix.hidden_states) == [0, 4] and prefix.final is not None
        assert prefix.final.dtype == self.dtype
        self.seen = prefix.input_ids.tolist()
    def accept(self, accepted):
        self.seen += accepted.input_ids.tolist()
    def propose(self, last_token, max_tokens, sampling):
        places = [i for i, token in enumerate(self.seen) if token == last_token]
        after = self.seen[places[-1] + 1 :] if places else []
        tokens = (after + [last_token] * max_tokens)[:max_tokens]
        return Proposal(tokens=torch.tensor(tokens), probs=None)

@hookimpl
def specforge_adapter():
    return Adapter()

@hookimpl
def specforge_draft(target):
    return Draft(model=nn.Linear(2, 2))

@hookimpl
def specforge_train_step():
    return lambda draft, batch, ctx: None

@hookimpl
def specforge_proposer(draft):
    return Repeater(draft)
"""


@pytest.fixture
def raw(env: FakeSite, tmp_path: Path, toy_target: Path) -> dict[str, Any]:
    env.strategy("repeater", REPEATER)
    return {
        "target": {"path": str(toy_target)},
        "strategy": {"name": "repeater"},
        "output_dir": str(tmp_path / "out"),
        "eval": {
            "prompts": {
                "short": str(write_conversations(tmp_path / "short.jsonl", 3)),
                "long": str(write_conversations(tmp_path / "long.jsonl", 4, seed=1, turns=3)),
            },
            "max_new_tokens": 24,
        },
    }


def run(raw: dict[str, Any], **options: Any) -> EvalReport:
    config, strategy = load(raw, **options)
    draft = strategy.draft(config.strategy, load_target_info(config.target), None)
    return evaluate(config, strategy, draft)


def load(raw: dict[str, Any], **options: Any) -> tuple[RunConfig, Strategy]:
    return validate({**raw, "eval": {**raw["eval"], **options}}, "test")


def test_reports_of_earlier_evaluations_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "acceptance.png"
    for number in range(3):
        keep_earlier(report, plot)
        report.write_text(str(number))
    plot.touch()
    keep_earlier(report, plot)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept.pop("acceptance.png") == kept.pop("acceptance-3.png") == ""
    assert kept == {"report.json": "2"} | {f"report-{n}.json": str(n - 1) for n in (1, 2, 3)}
    said = capsys.readouterr().err.replace("\n", "")
    assert said.count("was there, and is") == 4


@pytest.mark.slow
def test_a_report_of_every_set_is_written(raw: dict[str, Any], tmp_path: Path) -> None:
    report = run(raw)
    assert report.lossless is True
    assert report.lossless_reason == "7 of 7 greedy answers equal the target's own"
    assert {name: found.num_prompts for name, found in report.per_set.items()} == {
        "short": 3,
        "long": 4,
    }
    assert report.acceptance_length is not None
    assert report.acceptance_length > 1
    assert len(report.per_position) == 4
    assert report.tokens_per_second
    assert report.baseline_tokens_per_second
    assert (report.dtype, report.device, report.max_draft_tokens) == ("float32", "cpu", 4)
    out = tmp_path / "out" / "eval"
    assert sorted(path.name for path in out.iterdir()) == ["acceptance.png", "report.json"]
    assert json.loads((out / "report.json").read_text()) == json.loads(report.to_json())


def test_options_reach_the_decoding(raw: dict[str, Any]) -> None:
    report = run(raw, limit=2, max_draft_tokens=2, compare=False, max_new_tokens=5)
    assert report.num_prompts == 4
    assert report.max_draft_tokens == len(report.per_position) == 2
    assert report.new_tokens <= 20
    assert report.lossless is None
    assert report.baseline_tokens_per_second is None


@pytest.mark.slow
def test_bfloat16_moves_target_and_draft(raw: dict[str, Any]) -> None:
    report = run(raw, dtype="bfloat16", limit=1)
    assert report.dtype == "bfloat16"
    assert report.lossless is True


@pytest.mark.slow
def test_sampled_answers_repeat_with_the_seed(raw: dict[str, Any]) -> None:
    def counts(**options: Any) -> tuple[Any, ...]:
        found = run(raw, temperature=1.0, limit=2, **options)
        assert found.lossless is None
        assert found.baseline_tokens_per_second is not None
        return found.new_tokens, found.accepted, found.verifications, found.per_position

    assert counts(seed=1) == counts(seed=1)
    assert counts(seed=1) != counts(seed=2)


def test_a_prompt_is_what_comes_before_the_first_answer(raw: dict[str, Any]) -> None:
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "u"}
    answer = {"role": "assistant", "content": "a"}
    assert first_turn((system, user, answer, user)) == (system, user)
    assert first_turn((user, user)) == (user,)
    config, strategy = load(raw)
    tokenizer = load_tokenizer(config.target)
    sets = load_prompt_sets(config, strategy, tokenizer, load_target_info(config.target))
    text = tokenizer.decode(sets["long"][0].input_ids)
    assert text.count("<|im_start|>user") == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert sets["long"][3].where == "long.jsonl:4"


def refused(raw: dict[str, Any], message: str, kind: type[SpecForgeError] = ConfigError) -> None:
    config, strategy = load(raw)
    draft = strategy.draft(config.strategy, load_target_info(config.target), None)
    with pytest.raises(kind, match=message):
        evaluate(config, strategy, draft)
    assert not (config.output_dir / "eval" / "report.json").exists()


def test_prompts_must_be_configured(raw: dict[str, Any]) -> None:
    raw["eval"]["prompts"] = {}
    refused(raw, r"eval\.prompts names no prompt set. Try: eval\.prompts\.chat=FILE\.jsonl")


def test_a_missing_file_is_named(raw: dict[str, Any]) -> None:
    raw["eval"]["prompts"]["code"] = "nowhere.jsonl"
    refused(raw, r"eval\.prompts\.code: data file 'nowhere\.jsonl' does not exist")


def test_a_set_takes_what_training_takes(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files, a pattern, a folder, a home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    write_conversations(tmp_path / "folder" / "some.jsonl", 2, seed=5)
    raw["eval"]["prompts"] = {
        "one": "~/short.jsonl",
        "several": ["~/long.jsonl", str(tmp_path / "short.jsonl")],
        "pattern": str(tmp_path / "*.jsonl"),
        "folder": ["~/folder"],
    }
    config, strategy = load(raw)
    info = load_target_info(config.target)
    sets = load_prompt_sets(config, strategy, load_tokenizer(config.target), info)
    assert {name: len(found) for name, found in sets.items()} == {
        "one": 3,
        "several": 7,
        "pattern": 7,
        "folder": 2,
    }
    raw["eval"]["prompts"] = {"none": []}
    with pytest.raises(ConfigError, match=r"'none' names no file"):
        load(raw)


def test_a_bad_line_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(path.read_text() + "{oops\n")
    refused(raw, r"short\.jsonl:4 is not a line of JSON", DataError)


def test_a_prompt_longer_than_the_targets_positions_is_named(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    save_toy_target(tmp_path / "tiny", max_position_embeddings=40)
    raw["target"]["path"] = str(tmp_path / "tiny")
    refused(raw, r"jsonl:\d: a prompt of \d+ tokens leaves no room .* the target's 40", DataError)


@pytest.mark.slow
def test_prompts_without_room_for_an_answer_are_left_out_or_an_error(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_toy_target(tmp_path / "tiny", max_position_embeddings=90)
    raw["target"]["path"] = str(tmp_path / "tiny")
    path = tmp_path / "short.jsonl"
    long = {"messages": [{"role": "user", "content": "x" * 80}]}
    path.write_text(f"{json.dumps(long)}\n{path.read_text()}")
    for too_long in ("truncate", "raise"):
        raw["data"] = {"too_long": too_long}
        refused(raw, r"short\.jsonl:1: a prompt of \d+ tokens leaves no room", DataError)
    raw["data"] = {"too_long": "skip"}
    assert run(raw, limit=2).per_set["short"].num_prompts == 2
    assert "eval.prompts.short: 1 row skipped (1 too long)" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_prompts_are_skipped_and_counted(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["data"] = {"on_error": "skip"}
    path = tmp_path / "short.jsonl"
    path.write_text(f"{'[' * 100_000}\n{path.read_text()}")
    assert run(raw, limit=2).per_set["short"].num_prompts == 2
    assert "eval.prompts.short: 1 row skipped (1 not JSON)" in capsys.readouterr().err


def test_an_answer_ends_where_the_tokenizer_says_so_too(
    raw: dict[str, Any], tmp_path: Path, toy_target: Path
) -> None:
    """config.json and generation_config.json may name other tokens than the one that ends turns."""
    other = shutil.copytree(toy_target, tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps({**found, "eos_token_id": 0}))
    raw["target"]["path"] = str(other)
    config, strategy = load(raw)
    with open_target(config, strategy) as (_, _, limits):
        assert limits.eos == {0, load_tokenizer(config.target).eos_token_id}


def test_another_models_tokenizer_is_noticed(raw: dict[str, Any], tmp_path: Path) -> None:
    save_toy_target(tmp_path / "small", vocab_size=40, eos_token_id=1, pad_token_id=0)
    raw["target"]["path"] = str(tmp_path / "small")
    refused(raw, r"short\.jsonl:1: token id \d+ is beyond the target's vocabulary of 40", DataError)


def test_an_output_that_cannot_be_written_is_noticed_first(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    raw["output_dir"] = str(tmp_path / "file")
    refused(raw, r"file/eval cannot be written: .*Try: output_dir=DIRECTORY")
