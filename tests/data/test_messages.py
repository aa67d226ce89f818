"""Fields of rows and messages: each is used, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from specforge_core.config import DataConfig
from specforge_core.data.files import open_source
from specforge_core.data.messages import REASONING, OnlyRead, parse
from specforge_core.data.prompts import PromptSet
from specforge_core.errors import DataError
from specforge_core.testing.toy import toy_tokenizer

from .prompted import load_prompts

# in the manner of published templates that know tools
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"name": "weather", "arguments": {"city": "Graz"}}
CALLED = '<call>{"name": "weather", "arguments": {"city": "Graz"}}</call><|im_end|>'
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "c1"}


def tooled() -> PreTrainedTokenizerBase:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = TOOLS
    return tokenizer


def load(
    folder: Path, row: object, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> PromptSet:
    path = folder / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    tokenizer = tokenizer or tooled()

    def rows(source: str, data: DataConfig) -> Any:
        return open_source(source)

    return load_prompts(DataConfig(train=(str(path),), **options), tokenizer, len(tokenizer), rows)


def texts(prompts: PromptSet) -> tuple[str, list[str]]:
    """Return the text of the one prompt, and of each part that is supervised."""
    (prompt,) = list(prompts)
    tokenizer = toy_tokenizer()
    parts, on = [], False
    for token, mask in zip(prompt.input_ids.tolist(), prompt.loss_mask.tolist(), strict=True):
        if mask:
            parts[len(parts) - on :] = [[*(parts[-1] if on else []), token]]
        on = bool(mask)
    return str(tokenizer.decode(prompt.input_ids)), [str(tokenizer.decode(part)) for part in parts]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ({**ANSWER, "content": "", "tool_calls": [{"id": "c1", "function": CALL}]}, RESULT),
        ({"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}, RESULT),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {**CALL, "arguments": '{"city": "Graz"}'}}],
            },
            RESULT,
        ),
        ({**ANSWER, "content": "", "tool_calls": [CALL]}, RESULT),
        ({**ANSWER, "content": "", "tool_calls": [{**CALL, "input": None}]}, RESULT),
        (
            {"role": "assistant", "content": None, "function_call": CALL},
            {"role": "function", "name": "weather", "content": "sun"},
        ),
        (
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sun"},
        ),
        (
            {"role": "tool_call", "content": json.dumps([CALL])},
            {"role": "tool_response", "content": [{"type": "text", "text": "sun"}]},
        ),
    ],
)
@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [WEATHER]},
        {"tools": [WEATHER["function"]]},
        {"tools": [{"type": "function", **WEATHER["function"]}]},
        {"tools": json.dumps([WEATHER])},
        {"functions": [WEATHER]},
    ],
)
def test_calls_of_tools_and_what_follows_are_trained_on(
    tmp_path: Path, call: dict[str, Any], result: dict[str, Any], tools: dict[str, Any]
) -> None:
    text, parts = texts(load(tmp_path, {**tools, "messages": [ASK, call, result, ANSWER]}))
    assert parts == [CALLED, "a<|im_end|>"]
    assert f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>" in text
    assert "<result>sun</result>" in text


def test_a_call_with_a_text_before_it_and_several_at_once(tmp_path: Path) -> None:
    call = {**ANSWER, "tool_calls": [CALL, CALL]}
    row = {"messages": [ASK, call, RESULT, RESULT, call], "tools": [WEATHER]}
    once = CALLED.removesuffix("<|im_end|>")
    assert texts(load(tmp_path, row))[1] == [f"a{once}{once}<|im_end|>"] * 2


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_under_any_name_is_what_the_template_reads(tmp_path: Path, name: str) -> None:
    row = {"messages": [ASK, {**ANSWER, name: "hm"}]}
    assert texts(load(tmp_path, row))[1] == ["<think>hm</think>a<|im_end|>"]
    for read in REASONING:
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = TOOLS.replace("reasoning_content", read)
        assert texts(load(tmp_path, row, tokenizer))[1] == ["<think>hm</think>a<|im_end|>"]


def test_the_system_prompt_of_a_row(tmp_path: Path) -> None:
    row = {"system": "in verse", "conversations": [ASK, ANSWER]}
    text, parts = texts(load(tmp_path, row))
    assert text.startswith("<|im_start|>system\nin verse<|im_end|>\n<|im_start|>user\nq")
    assert parts == ["a<|im_end|>"]
    assert "in verse" not in texts(load(tmp_path, row, ignore_fields=("system",)))[0]
    assert parse({"system": "", "messages": [ASK]}).messages == (ASK,)
    # as in a table of several sources
    for other in (None, []):
        assert parse({"messages": [ASK], "conversations": other}).messages == (ASK,)
        assert parse({"messages": other, "conversations": [ASK]}).messages == (ASK,)
    parts = [{"type": "text", "text": "q", "image": None, "cache_control": {"type": "ephemeral"}}]
    assert parse({"messages": [{"from": "human", "role": "user", "content": parts}]}).messages == (
        ASK,
    )


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
@pytest.mark.parametrize("on", [{}, {"weight": 1}, {"train": True}, {"weight": None}])
@pytest.mark.parametrize("turns", [1, 12])
def test_answers_that_are_only_read(
    tmp_path: Path, off: dict[str, Any], on: dict[str, Any], turns: int
) -> None:
    bad = {"role": "assistant", "content": "bad", **off}
    row = {"messages": [ASK, bad, ASK, {**ANSWER, **on}] * turns}
    text, parts = texts(load(tmp_path, row, max_length=10_000))
    assert parts == ["a<|im_end|>"] * turns
    assert text.count("bad<|im_end|>") == turns
    everything = load(tmp_path, row, max_length=10_000, ignore_fields=("weight", "train"))
    assert texts(everything)[1] == ["bad<|im_end|>", "a<|im_end|>"] * turns


def test_a_conversation_that_is_only_read_is_counted(tmp_path: Path) -> None:
    row = {"messages": [ASK, {**ANSWER, "weight": 0}]}
    with pytest.raises(DataError, match=r"marks no answer as trained on \(weight, train\)"):
        load(tmp_path, row)
    assert isinstance(parse(row).messages[1], OnlyRead)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, {**ANSWER, "mask": 0}]}, "message 2 has 'mask', which is not used"),
        ({"messages": [ASK, {**ANSWER, "loss": False}]}, "message 2 has 'loss'"),
        (
            {"messages": [{**ASK, "images": ["x.png"], "b": 1}]},
            "message 1 has 'b', 'images', which is not used. If it means nothing for the "
            "training: data.ignore_fields=[b, images]",
        ),
        ({"messages": [ASK, ANSWER], "images": ["x.png"]}, "the row has 'images'"),
        ({"messages": [ASK, ANSWER], "system_prompt": "be brief"}, "the row has 'system_prompt'"),
        ({"messages": [ASK, ANSWER], "chosen": [ANSWER]}, "the row has 'chosen'"),
        ({"messages": [ASK, ANSWER], "weight": 0}, "the row has 'weight'"),
        ({"messages": [ASK, ANSWER], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"messages": [ASK, ANSWER], "enable_thinking": True}, "the row has 'enable_thinking'"),
        ({"messages": [ASK, ANSWER], "thinking": False}, "the row has 'thinking'"),
        ({"messages": [ASK, ANSWER], "reasoning_effort": "high"}, "has 'reasoning_effort'"),
        ({"messages": [ASK, ANSWER], "label": False}, "the row has 'label', which is not used"),
        ({"messages": [ASK, ANSWER], "system_message": "be brief"}, "has 'system_message'"),
        ({"messages": [ASK, ANSWER], "mask": [0, 1]}, "the row has 'mask'"),
        ({"messages": json.dumps([ASK, ANSWER])}, "jq -c '(.messages, .conversations | strings)"),
        ({"messages": [{**ASK, "from": "gpt"}, ANSWER]}, "message 1: 'role' and 'from' differ"),
        ({"messages": [ASK, {**ANSWER, "value": "b"}]}, "2: 'content' and 'value' differ"),
        ({"messages": [{**ASK, "content": [{"image": "x.png"}]}]}, "a part with 'image'"),
        (
            {"messages": [ASK, {**ANSWER, "content": [{"text": "a", "thought": True}]}]},
            "a message has a part with 'thought'; only text is supported",
        ),
        ({"messages": [{**ASK, "content": [{}]}]}, "the text of a message's part must be text"),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "input": {"x": 1}}]}]},
            "message 2: a call has 'input' and no 'arguments'",
        ),
        ({"prompt": [ASK], "completion": [ANSWER]}, "'{messages: (.prompt + .completion)}'"),
        ({"messages": [ASK, ANSWER], "conversations": [ASK]}, "the row has 'conversations'"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "message 2 has 'weight': 0.5"),
        ({"messages": [ASK, {**ANSWER, "weight": "0"}]}, "message 2 has 'weight': '0'"),
        ({"messages": [{**ASK, "train": True}, ANSWER]}, "'train': true, and is no assistant's"),
        ({"messages": [{**ASK, "reasoning": "x"}]}, "'reasoning', and is no assistant's"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}]}, "calls tools, and is of the role 'user'"),
        (
            {"messages": [ASK, {**ANSWER, "reasoning": "x", "thinking": "y"}]},
            "message 2: 'reasoning' and 'thinking' differ",
        ),
        ({"messages": [ASK, {**ANSWER, "tool_calls": 3}]}, "'tool_calls' must be a list"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": "["}]}, "'tool_calls' must be JSON"),
        (
            {"messages": [ASK, {**ANSWER, "function_call": {"name": "f", "arguments": "{x"}}]},
            "message 2: the arguments of a call must be JSON",
        ),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "message 2: the arguments of a call must be an object",
        ),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "\ud83d"}]}]},
            "message 2: a call cannot be written as JSON",
        ),
        ({"messages": [{"from": "function_call", "value": "f()"}]}, "message 1 must be JSON"),
        ({"messages": [ASK], "tools": {"a": 1}}, "the row's 'tools' must be a list"),
        ({"messages": [ASK], "tools": "[1"}, "the row's 'tools' must be JSON"),
        ({"messages": [ASK], "tools": [{"function": {}}]}, "a tool must be a function with a name"),
        (
            {"messages": [{"role": "system", "content": "x"}, ASK], "system": "y"},
            "the row has a 'system' and its messages begin with one",
        ),
        ({"messages": [ASK], "system": 3}, "content must be text, found 3"),
    ],
)
def test_what_is_not_used_is_refused_by_its_name(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        load(tmp_path, row)
    assert message in str(error.value)
    assert "d.jsonl:1" in str(error.value)


def test_what_is_listed_is_left_out(tmp_path: Path) -> None:
    row = {"messages": [ASK, {**ANSWER, "mask": 0, "thinking": "x"}], "images": ["x.png"]}
    found = load(tmp_path, row, ignore_fields=("mask", "images", "thinking"))
    assert texts(found)[1] == ["a<|im_end|>"]


def test_notes_empty_columns_and_copies_are_no_errors() -> None:
    row = {
        "messages": [{**ASK, "images": [], "mask": None, "timestamp": 3}, {**ANSWER, "id": "x"}],
        **{"id": 1, "source": "here", "tools": [], "system": None, "weight": 1, "prompt": "q"},
        **{"label": "a topic", "conversations": [{"value": "q"}, {"value": "a"}]},
    }
    assert parse(row).messages == (ASK, ANSWER)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": [ASK, ANSWER], "tools": [WEATHER]}, ["tools"]),
        ({"messages": [ASK, ANSWER], "functions": [WEATHER]}, ["functions"]),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [CALL]}]}, ["tool_calls"]),
        ({"messages": [ASK, {**ANSWER, "function_call": CALL}]}, ["function_call"]),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "hm"}]}, ["reasoning_content"]),
        ({"messages": [ASK, {**ANSWER, "thinking": "hm"}]}, ["thinking"]),
        (
            {"messages": [ASK, {**ANSWER, "reasoning": "hm", "thinking": "hm"}]},
            ["reasoning", "thinking"],
        ),
    ],
)
def test_what_the_template_does_not_write_is_not_dropped_silently(
    tmp_path: Path, row: dict[str, Any], names: list[str]
) -> None:
    """The fields are called as the row calls them, and what the message says helps."""
    listed = " and ".join(f"'{name}'" for name in names)
    message = rf"d\.jsonl:1: the conversation has {listed}, which the target's chat template does"
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, row, toy_tokenizer())
    assert f"data.ignore_fields=[{', '.join(names)}]" in str(error.value)
    assert texts(load(tmp_path, row, toy_tokenizer(), ignore_fields=names))[1] == ["a<|im_end|>"]
