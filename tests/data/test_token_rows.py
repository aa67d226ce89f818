"""What a target generated is what is trained on, whatever its template does to it afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_core.batches.loader import Batches
from specforge_core.data.regenerate import regenerate
from specforge_core.load import validate
from specforge_core.strategy import Strategy
from specforge_core.testing.runs import losses
from specforge_core.train.run import train
from specforge_core.types import Prompt

from .scripted import (
    QUESTIONS,
    SAID,
    THOUGHT,
    answer,
    asked,
    run_of,
    save,
    supervised,
    trained,
    write_out,
)
from .templates import STYLES, Style


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("name", "spelled"),
    # tokens that the tokenizer would not write show whatever is tokenized again
    [*((name, True) for name in STYLES), ("chatml", False), ("harmony", False), ("glm4", False)],
)
def test_the_trained_tokens_are_the_generated_ones(
    tmp_path: Path, name: str, spelled: bool
) -> None:
    style = STYLES[name]
    tokenizer = save(style, tmp_path / "target")
    text = style.writes.format(thought=THOUGHT, said=SAID)
    whole = write_out(tokenizer, text + style.end, spelled=spelled)
    cut = write_out(tokenizer, text, spelled=spelled)[:-2]
    script = {
        str(i): [
            {"tokens": whole, "finished": True}
            if (i, turn) != (1, 2)
            else {"tokens": cut, "finished": False}
            for turn in range(len(chat))
        ]
        for i, chat in enumerate(QUESTIONS)
    }
    run = run_of(tmp_path / "target", tmp_path, style)
    assert answer(run, tmp_path, script, *QUESTIONS).num_written == 2

    found = list(supervised(trained(run)))

    expected = asked(tmp_path)
    assert len(expected) == 4
    assert sorted(found) == sorted(expected)
    assert sorted(written for _, written in found) == sorted([cut, whole, whole, whole])
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    by_id = {row["id"]: row for row in map(json.loads, lines)}
    assert by_id["0"]["finish_reason"] == ["stop"]
    assert by_id["1"]["finish_reason"] == ["stop", "stop", "length"]
    said = [m["content"] for m in by_id["1"]["messages"] if m["role"] == "assistant"]
    assert all(SAID.strip() in text for text in said[:2])


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("name", ["qwen3 thinking", "r1", "harmony", "glm45"])
def test_training_reads_what_the_target_wrote(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the prompts to the batches of a training, whose draft sees no other token."""
    style = STYLES[name]
    tokenizer = save(style, tmp_path / "target")
    text = style.writes.format(thought=THOUGHT, said=SAID)
    written = [{"tokens": write_out(tokenizer, text + style.end, spelled=True), "finished": True}]
    run = run_of(tmp_path / "target", tmp_path, style)
    script = {str(i): written * len(chat) for i, chat in enumerate(QUESTIONS)}
    answer(run, tmp_path, script, *QUESTIONS)
    seen: list[Prompt] = []
    micro_batches = Batches.micro_batches

    def watched(self: Batches, source: Any, position: int) -> Iterator[Any]:
        for micro in micro_batches(self, source, position):
            if micro.num_samples:
                ids, mask = micro.batch["input_ids"][0], micro.batch["loss_mask"][0]
                seen.append(Prompt(index=len(seen), input_ids=ids, loss_mask=mask))
            yield micro

    monkeypatch.setattr(Batches, "micro_batches", watched)
    raw = run.model_dump()
    raw["target"] |= {"engine": "transformers", "options": {}}
    raw |= {"output_dir": str(tmp_path / "run")}
    raw["train"] |= {
        "batch_size": 1,
        "epochs": 1,
        "log_every": 1,
        "device": "cpu",
        "compute_dtype": "float32",
    }
    train(*validate(raw, "the test"))
    epoch = seen[: len(trained(run))]
    assert len(losses(tmp_path / "run")) == len(epoch) > 1
    assert sorted(supervised(epoch)) == sorted(asked(tmp_path))


TOOLS = """{%- if tools -%}{{ '<|im_start|>tools\n' + tools|tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<call>' + call.function.name + call.function.arguments|tojson + '</call>' }}
{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


@pytest.mark.usefixtures("scripted")
def test_with_tools_the_answer_behind_the_last_result_is_written(tmp_path: Path) -> None:
    """Earlier calls stand as they are: the results that follow are theirs."""
    style = Style(TOOLS, "{said}", "<|im_end|>", ("<|im_start|>",))
    tokenizer = save(style, tmp_path / "target")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    user = {"role": "user", "content": "Look!"}
    called = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    called += [{"role": "tool", "content": "a cat"}]
    rows = [
        {"id": "asks", "messages": [user, {"role": "assistant", "content": "ANOTHER"}]},
        {"id": "reads", "messages": [*called, {"role": "assistant", "content": "ANOTHER"}]},
    ]
    run = run_of(tmp_path / "target", tmp_path, style)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({**row, "tools": [tool]}) + "\n" for row in rows)
    )
    texts = ['<call>look{"at": "it"}</call>', "It is a cat."]
    script = {
        str(i): [{"tokens": write_out(tokenizer, f"{t}<|im_end|>", spelled=True), "finished": True}]
        for i, t in enumerate(texts)
    }
    (tmp_path / "script.json").write_text(json.dumps(script))
    report = regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    assert (report.num_prompts, report.num_written) == (2, 2)

    expected = asked(tmp_path)
    for read, _ in expected:
        assert "<|im_start|>tools\n[{" in tokenizer.decode(read)
    assert "a cat<|im_end|>\n<|im_start|>assistant\n" in max(
        (tokenizer.decode(read) for read, _ in expected), key=len
    )
    assert sorted(supervised(trained(run))) == sorted(expected)
    # and as text: calls that were only read are not trained on
    lines = [
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text("utf-8").rstrip("\n").split("\n")
    ]
    assert "ANOTHER" not in str(lines)
    plain = [{k: v for k, v in line.items() if k != "token_rows"} for line in lines]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    said = [tokenizer.decode(written) for _, written in supervised(trained(run))]
    assert sorted(said) == sorted(f"{text}<|im_end|>" for text in texts)


LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.slow
@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.calls])
def test_calls_and_answers_behind_results_are_the_generated_tokens(
    tmp_path: Path, name: str
) -> None:
    """In every template that has tools, with thoughts and without."""
    style = STYLES[name]
    assert style.calls is not None
    tokenizer = save(style, tmp_path / "target")
    user = {"role": "user", "content": "the question"}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    rows = [
        {"id": "asks", "messages": [user]},
        {"id": "reads", "messages": [user, called, {"role": "tool", "content": "THE RESULT"}]},
    ]
    run = run_of(tmp_path / "target", tmp_path, style)
    asking = "".join(json.dumps({**row, "tools": [LOOK]}) + "\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(asking)
    calls = style.calls.format(thought=THOUGHT, arguments='{"at": "it"}')
    texts = [
        calls + (style.call_end or style.end),
        style.writes.format(thought=THOUGHT, said=SAID) + style.end,
    ]
    script = {
        str(i): [{"tokens": write_out(tokenizer, text, spelled=True), "finished": True}]
        for i, text in enumerate(texts)
    }
    (tmp_path / "script.json").write_text(json.dumps(script))
    report = regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    assert report.num_written == 2

    expected = asked(tmp_path)
    assert sorted(supervised(trained(run))) == sorted(expected)
    assert {tokenizer.decode(written) for _, written in expected} == set(texts)
    (asks,), (reads,) = (
        [tokenizer.decode(read) for read, written in expected if tokenizer.decode(written) == text]
        for text in texts
    )
    assert all('"name": "look"' in prompt for prompt in (asks, reads))
    assert "THE RESULT" in reads
    assert "THE RESULT" not in asks
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    kept = {row["id"]: row for row in map(json.loads, lines)}
    last = kept["asks"]["messages"][-1]
    assert "look" in (last["content"] or last["tool_calls"][0]["function"]["name"])
