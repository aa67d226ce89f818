"""Tokens in a row of data: whose they are, damaged ones, and what the text says without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data.harmony import as_message
from specforge_core.data.messages import parse, tokens_alone
from specforge_core.data.regenerate import regenerate
from specforge_core.data.tokenrows import cut_answers
from specforge_core.errors import DataError
from specforge_core.strategy import Strategy
from specforge_core.testing.toy import save_toy_target, toy_tokenizer

from .scripted import (
    answer,
    run_of,
    supervised,
    toy_answers,
    trained,
    write_out,
)
from .templates import STYLES, Style


def change(path: Path, **values: Any) -> None:
    row = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**row, **values}.items() if v is not None}))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("part", ["weights or config", "tokenizer", "chat template"])
def test_tokens_of_another_target_are_refused_by_name(tmp_path: Path, part: str) -> None:
    run = toy_answers(tmp_path)
    assert len(trained(run)) == 1
    shutil.rmtree(tmp_path / "target")
    save_toy_target(tmp_path / "target", seed=part == "weights or config")
    tokenizer = toy_tokenizer()
    if part == "tokenizer":
        tokenizer.eos_token = "<|endoftext|>"
    if part == "chat template":
        tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path / "target")
    with pytest.raises(DataError) as error:
        trained(run)
    assert str(error.value).startswith("answers.jsonl:1: its tokens were written with another ")
    assert f"{part} than this run's" in str(error.value)
    assert "Answer the prompts with this target: specforge regenerate" in str(error.value)
    # what the message says: without them the text is trained on
    assert "data.ignore_fields=[token_rows]" in str(error.value)
    data = DataConfig(train=run.data.train, ignore_fields=("token_rows",))
    (row,) = trained(run.model_copy(update={"data": data}))
    assert row.loss_mask.sum() == 4


@pytest.mark.usefixtures("scripted")
def test_arguments_of_the_template_and_the_date_may_differ(tmp_path: Path) -> None:
    """They are in the tokens: files with and without thoughts are trained on together."""
    run = toy_answers(tmp_path)
    data = {"chat_template_kwargs": {"enable_thinking": False}, "now": "2030-01-01"}
    other = run.model_copy(update={"data": DataConfig(train=run.data.train, **data)})
    assert [p.input_ids.tolist() for p in trained(other)] == [
        p.input_ids.tolist() for p in trained(run)
    ]
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    assert row["sampling"]["chat_template_kwargs"] == {}


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ([], "'token_rows' is no list"),
        ("x", "'token_rows' is no list"),
        ([5], "'input_ids' is no list of token ids"),
        ([{"input_ids": [], "loss_mask": []}], "'input_ids' is no list"),
        ([{"input_ids": [1, -1], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2.0], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, True], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2**31], "loss_mask": [0, 1]}], "'input_ids' is no list"),
        ([{"input_ids": [1, 2], "loss_mask": [1]}], "there are 2 input_ids, and a loss_mask of 1"),
        ([{"input_ids": [1, 2]}], "'loss_mask' is no list of 0 and 1"),
        ([{"input_ids": [1, 2], "loss_mask": [0, 2]}], "'loss_mask' is no list of 0 and 1"),
        ([{"input_ids": [1, 260], "loss_mask": [0, 1]}], "token id 260 is beyond"),
    ],
)
def test_damaged_tokens_are_named(tmp_path: Path, damaged: Any, message: str) -> None:
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", token_rows=damaged)
    with pytest.raises(DataError, match=rf"^answers\.jsonl:1: .*{message}"):
        trained(run)


@pytest.mark.usefixtures("scripted")
def test_tokens_are_cut_to_the_longest_sample(tmp_path: Path) -> None:
    run = toy_answers(tmp_path)
    (whole,) = trained(run)
    limit = len(whole.input_ids) - 1
    short = run.model_copy(update={"data": DataConfig(train=run.data.train, max_length=limit)})
    (cut,) = trained(short)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:limit]
    refuse = DataConfig(train=run.data.train, max_length=limit, too_long="raise")
    with pytest.raises(DataError, match=rf"{limit + 1} tokens, longer than data\.max_length"):
        trained(run.model_copy(update={"data": refuse}))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("reasons", [["length"], "length"])
def test_text_of_a_cut_answer_has_no_end(tmp_path: Path, reasons: object) -> None:
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", token_rows=None, finish_reason=reasons)
    (row,) = trained(run)
    assert toy_tokenizer().decode(row.input_ids[row.loss_mask.bool()]) == "yes"
    data = DataConfig(train=run.data.train, ignore_fields=("finish_reason",))
    (row,) = trained(run.model_copy(update={"data": data}))
    assert toy_tokenizer().decode(row.input_ids[row.loss_mask.bool()]) == "yes<|im_end|>"


@pytest.mark.usefixtures("scripted")
def test_a_row_of_a_table_has_an_empty_column_of_tokens(tmp_path: Path) -> None:
    run = toy_answers(tmp_path)
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    (tmp_path / "answers.jsonl").write_text(json.dumps({**row, "token_rows": None}))
    assert len(trained(run)) == 1


@pytest.mark.usefixtures("scripted")
def test_prompts_of_an_earlier_regeneration(tmp_path: Path) -> None:
    """Their tokens are another's: none of them stay in what is written."""
    run = toy_answers(tmp_path)
    change(tmp_path / "answers.jsonl", retokenized=True)
    shutil.move(tmp_path / "answers.jsonl", tmp_path / "p.jsonl")
    other = write_out(toy_tokenizer(), "no<|im_end|>", spelled=False)
    (tmp_path / "script.json").write_text(json.dumps({"0": [{"tokens": other, "finished": True}]}))
    regenerate(run, Strategy.load("linear"), tmp_path / "answers.jsonl")
    row = json.loads((tmp_path / "answers.jsonl").read_text())
    assert "retokenized" not in row
    ((_, written),) = supervised(trained(run))
    assert written == other


@pytest.mark.usefixtures("scripted")
def test_tokens_that_were_made_of_text_are_said_to_be(tmp_path: Path) -> None:
    style = Style(str(toy_tokenizer().chat_template), "{said}", "<|im_end|>")
    save_toy_target(tmp_path / "target")
    tokens = write_out(toy_tokenizer(), "yes<|im_end|>", spelled=False)
    given = {"tokens": tokens, "finished": True, "retokenized": True}
    report = answer(run_of(tmp_path / "target", tmp_path, style), tmp_path, {"0": [given]}, ("Hi",))
    assert "1 tokenized anew (the server gives no token ids)" in str(report)
    assert json.loads((tmp_path / "answers.jsonl").read_text())["retokenized"] is True


CHANNELLED = "<|channel|>commentary"
BEGINS = "<|start|>assistant"


@pytest.mark.parametrize(
    ("text", "content", "thought", "calls"),
    [
        ("plain <|channel|>", "plain <|channel|>", None, []),
        (" to=functions.f and more", " to=functions.f and more", None, []),
        (STYLES["harmony"].writes.format(thought="t", said="s"), "s", "t", []),
        ("<|channel|>final<|message|>s", "s", None, []),
        ("<|channel|>analysis<|message|>cut o", "", "cut o", []),
        (f"<|channel|>analysis<|message|>t<|end|>{BEGINS}<|chan", "", "t", []),
        (
            f"{CHANNELLED}<|message|>I look.<|end|>{BEGINS}{CHANNELLED} "
            'to=functions.f <|constrain|>json<|message|>{"a": 1}',
            "I look.",
            None,
            [("f", {"a": 1})],
        ),
        (
            "<|channel|>analysis<|message|>t<|end|>"
            f"{BEGINS} to=functions.f{CHANNELLED} json<|message|>{{}}<|call|>"
            f"{BEGINS} to=functions.g{CHANNELLED}<|message|>{{}}",
            "",
            "t",
            [("f", {}), ("g", {})],
        ),
        (f' to=functions.f{CHANNELLED} json<|message|>{{"a": 1}}', "", None, [("f", {"a": 1})]),
        (f' to=functions.f{CHANNELLED} json<|message|>{{"a": ', "", None, []),  # cut off
        ("<|channel|>analysis to=python code<|message|>print(1)", "", None, []),
        ("<|channel|>final<|message|>a\n<b>", "a\n<b>", None, []),
    ],
)
def test_answers_in_channels(
    text: str, content: str, thought: str | None, calls: list[tuple[str, Any]]
) -> None:
    expected: dict[str, Any] = {"role": "assistant", "content": content}
    if thought:
        expected["reasoning_content"] = thought
    if calls:
        made = [{"name": name, "arguments": arguments} for name, arguments in calls]
        expected["tool_calls"] = [{"type": "function", "function": one} for one in made]
    assert as_message(text) == expected


@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        ({"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2], "labels": [-100, 1, 2]}, False),
        ({"weight": 1, "prompt": "q"}, False),
        ({"attention_mask": [0, 1, 1]}, True),  # padding on the left
        ({"position_ids": [0, 1, 0]}, True),  # two documents
        ({"labels": [-100, -100, 2]}, True),
        ({"weight": 0}, True),
        ({"images": ["x.png"]}, True),
    ],
)
def test_what_stands_beside_tokens(beside: dict[str, Any], refused: bool) -> None:
    row = {"input_ids": [1, 1, 2], "loss_mask": [0, 1, 1], **beside}
    if refused:
        (name,) = beside
        with pytest.raises(ValueError, match=rf"the row of tokens has '{name}'.*=\[{name}\]"):
            tokens_alone(row)
    assert tokens_alone(row, beside if refused else ())
    assert not tokens_alone({**row, "messages": []})


ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
READ = {**ANSWER, "weight": 0}


@pytest.mark.parametrize("said", [{"finish_reason": "length"}, {"stop_reason": "max_tokens"}])
@pytest.mark.parametrize("beside", [{}, {"system": "s"}])
def test_other_data_says_of_a_message_or_of_the_last_one_that_it_was_broken_off(
    said: dict[str, Any], beside: dict[str, Any]
) -> None:
    def cut(*messages: dict[str, Any], **row: Any) -> list[int]:
        row = {**beside, "messages": list(messages), **row}
        assert not cut_answers(row, parse(row).messages, tuple(said))
        return sorted(cut_answers(row, parse(row).messages))

    broken_off = {**ANSWER, **said}
    assert cut(ASK, broken_off, ASK, ANSWER) == [0]
    assert cut(ASK, READ, ASK, broken_off, ASK, ANSWER) == [0]  # of those that are trained on
    assert cut(ASK, ANSWER, ASK, ANSWER, **said) == [1]
    assert cut(ASK, ANSWER, ASK, READ, **said) == []
    assert cut(ASK, {**ANSWER, "finish_reason": "stop"}, finish_reason="stop") == []
