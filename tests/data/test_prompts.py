from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.config import DataConfig
from specforge_core.data.files import open_source
from specforge_core.data.prompts import PromptSet
from specforge_core.errors import DataError
from specforge_core.testing.toy import toy_tokenizer, write_conversations

from .prompted import load_prompts

TOKENIZER = toy_tokenizer()
VOCAB = len(TOKENIZER)


def write(path: Path, *chats: list[str] | str) -> Path:
    """Write one conversation a list, user and assistant taking turns, or a raw line."""
    lines = []
    for chat in chats:
        if isinstance(chat, str):
            lines.append(chat)
            continue
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(chat)]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


def load(path: Path, **options: Any) -> PromptSet:
    return prompts_of(path, TOKENIZER, **options)


def prompts_of(path: Path, tokenizer: Any, vocab_size: int = VOCAB, **options: Any) -> PromptSet:
    def rows(source: str, data: DataConfig) -> Any:
        return open_source(source)

    return load_prompts(DataConfig(train=(str(path),), **options), tokenizer, vocab_size, rows)


def lengths(prompts: PromptSet) -> list[int]:
    return [len(p.input_ids) for p in prompts]


def test_prompts_are_the_tokenized_conversations(tmp_path: Path) -> None:
    prompts = load(write(tmp_path / "d.jsonl", ["Hi", "Hello"], ["a", "b", "c", "d"]))

    assert [p.index for p in prompts] == [0, 1] == [prompts[0].index, prompts[-1].index]
    assert prompts.num_tokens == sum(lengths(prompts))
    first = prompts[0]
    assert first.input_ids.dtype == first.loss_mask.dtype == torch.int64
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert TOKENIZER.decode(first.input_ids) == text
    assert TOKENIZER.decode(first.input_ids[first.loss_mask.bool()]) == "Hello<|im_end|>"
    assert [p.index for p in prompts[:5]] == [0, 1]
    with pytest.raises(IndexError):
        prompts[2]


def test_token_counts_are_of_supervised_tokens(tmp_path: Path) -> None:
    counts = load(write(tmp_path / "d.jsonl", ["aaaa", "ab"], ["x", "b"])).token_counts(VOCAB)
    a, b = (TOKENIZER.convert_tokens_to_ids(c) for c in "ab")
    assert counts.shape == (VOCAB,)
    assert counts.dtype == torch.int64
    assert [int(counts[i]) for i in (a, b, TOKENIZER.eos_token_id)] == [1, 2, 2]
    assert int(counts.sum()) == 5


def test_storage_is_flat_and_small(tmp_path: Path) -> None:
    prompts = load(write_conversations(tmp_path / "d.jsonl", 50, turns=3))
    assert len(pickle.dumps(prompts)) < 6 * prompts.num_tokens


def test_template_that_rewrites_history_gives_several_prompts(tmp_path: Path) -> None:
    """The index is the place in the set, not the conversation."""
    tokenizer = toy_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}",
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}-{% endif %}",
    )
    path = write(tmp_path / "d.jsonl", ["q", "a", "r", "b"], ["x", "y"])
    prompts = prompts_of(path, tokenizer)
    answers = [TOKENIZER.decode(p.input_ids[p.loss_mask.bool()]) for p in prompts]
    assert answers == ["a<|im_end|>", "b<|im_end|>", "y<|im_end|>"]
    assert [p.index for p in prompts] == [0, 1, 2]


def test_too_long(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "x" * 100], ["Hi", "Hello"], ["x" * 100, "Hi"])

    cut = load(path, max_length=80)
    # the third is cut before its answer starts
    assert lengths(cut) == [80, lengths(load(path))[1]]

    skipped = load(path, max_length=80, too_long="skip")
    assert lengths(skipped) == lengths(cut)[1:]

    length = lengths(load(path))[0]
    with pytest.raises(DataError) as error:
        load(path, max_length=80, too_long="raise", on_error="skip")
    assert f"d.jsonl:1: {length} tokens, longer than data.max_length=80" in str(error.value)
    assert f"Try: data.max_length={length}, or data.too_long=truncate" in str(error.value)

    with pytest.raises(DataError, match=r"none of 3 conv.*Try: data\.max_length=20,"):
        load(path, max_length=10)


def test_bad_line_raises_or_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"], "{", ["Hi"])
    with pytest.raises(DataError, match=r"d\.jsonl:2 is not a line of JSON"):
        load(path)
    prompts = load(path, on_error="skip")
    text = TOKENIZER.decode(prompts[0].input_ids)
    assert len(prompts) == 1
    assert "Hello" in text
    with pytest.raises(DataError, match=r"every conversation .* was skipped, .*d\.jsonl:1 is not"):
        load(write(tmp_path / "d.jsonl", "{"), on_error="skip")


def test_conversation_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"])
    with pytest.raises(DataError, match=r"d\.jsonl:1: the chat template refuses .*: not today"):
        prompts_of(path, tokenizer)


def test_missing_template_is_not_skipped_line_by_line(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"])
    with pytest.raises(DataError, match="has no chat template"):
        prompts_of(path, tokenizer, on_error="skip")


def test_token_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"])
    with pytest.raises(DataError) as error:
        prompts_of(path, TOKENIZER, 200, on_error="skip")
    largest = int(load(path)[0].input_ids.max())
    assert f"token id {largest} is beyond the target's vocabulary of 200" in str(error.value)


RECURSION = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        (RECURSION, "RecursionError"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
        ("{{ raise_exception('not this one') }}", "not this one"),
        ("{{ 'x' * (10 ** 18) }}", "MemoryError"),
        ("{{ messages[7]['content']['x'] }}", ""),
    ],
)
def test_a_row_that_the_template_fails_on_is_named_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, told: str
) -> None:
    """Whatever goes wrong in a template: it is a program."""
    tokenizer = toy_tokenizer()
    fails = "{% if messages[0]['content'] == 'bad' %}" + program + "{% endif %}"
    tokenizer.chat_template = f"{fails}{tokenizer.chat_template}"
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"], ["bad", "Hello"], ["Hi", "you"])
    with pytest.raises(DataError, match=r"d\.jsonl:2: the chat template refuses") as error:
        prompts_of(path, tokenizer)
    assert told in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    prompts = prompts_of(path, tokenizer, on_error="skip")
    assert len(prompts) == 2
    assert prompts.skipped == {"refused by the chat template": 1}
    told_at_the_end = "data.train: 1 row skipped (1 refused by the chat template)"
    assert told_at_the_end in capsys.readouterr().err


def test_reasons_of_all_kinds_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl", ["Hi", "x"], "{", "[" * 100_000, ["Hi"], ["Hi", "y" * 99], "3"
    )
    prompts = load(path, on_error="skip", too_long="skip", max_length=90)
    assert len(prompts) == 1
    expected = {"not JSON": 2, "without an answer": 1, "too long": 1, "not a conversation": 1}
    assert prompts.skipped == expected


def test_no_row_is_longer_than_the_targets_positions(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "x" * 100], ["Hi", "Hello"])

    def bounded(**options: Any) -> PromptSet:
        def rows(source: str, data: DataConfig) -> Any:
            return open_source(source)

        data = DataConfig(train=(str(path),), **options)
        return load_prompts(data, TOKENIZER, VOCAB, rows, positions=80)

    assert max(lengths(bounded())) == 80
    assert lengths(bounded(too_long="skip")) == lengths(load(path))[1:]
    with pytest.raises(DataError, match=r"d\.jsonl:1: \d+ tokens, longer than the target's 80 pos"):
        bounded(too_long="raise")
    assert lengths(bounded(max_length=75)) == [75, lengths(load(path))[1]]
    write(tmp_path / "d.jsonl", ["x" * 100, "Hi"], ["Hi", "Hello"])
    assert bounded().skipped == {"without an answer in the target's positions": 1}
    assert bounded(max_length=75).skipped == {"without an answer in data.max_length": 1}


def test_the_length_of_a_huge_row_is_not_counted_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "x" * 1_000_000])
    with pytest.raises(DataError) as error:
        load(path, max_length=80, too_long="raise")
    assert "tokens, longer than data.max_length=80 tokens. Try: data.too_long=trunc" in str(
        error.value
    )
    assert "d.jsonl:1: more than" in str(error.value)


def test_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["a", "b"], ["c", "d"], "not read")
    assert len(load(path, limit=2)) == 2


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train names no file\. Try: data\.train="):
        load_prompts(DataConfig(), TOKENIZER, VOCAB, lambda source, data: [])
    with pytest.raises(DataError, match="no conversations in"):
        load(write(tmp_path / "d.jsonl", ""))


def test_rows_that_are_tokens(tmp_path: Path) -> None:
    ids = list(range(20))
    plain = {"input_ids": ids, "loss_mask": [0] * 5 + [1] * 15}
    bools = {"input_ids": ids, "loss_mask": [False] * 5 + [True] * 15}
    path = write(tmp_path / "d.jsonl", json.dumps(plain), ["Hi", "Hello"], json.dumps(bools))
    prompts = load(path)
    for row in (prompts[0], prompts[2]):
        assert row.input_ids.tolist() == ids
        assert row.loss_mask.tolist() == plain["loss_mask"]
    assert lengths(load(path, max_length=8))[0] == 8
    with pytest.raises(DataError, match=r"token id 19 is beyond the target's vocabulary of 19"):
        prompts_of(path, TOKENIZER, 19)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "'loss_mask' is no list of 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "'loss_mask' is no list of 0 and 1"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "Try: jq -c '{input_ids, loss_mask: (.labels"),
        ({"input_ids": [1, 2], "loss_mask": [0.0, 1.0]}, "'loss_mask' is no list"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1, 1]}, "there are 2 input_ids, and a loss_mask"),
        ({"input_ids": [1, -2], "loss_mask": [0, 1]}, "'input_ids' is no list of token ids"),
        ({"input_ids": [], "loss_mask": []}, "'input_ids' is no list of token ids"),
        ({"input_ids": ["1"], "loss_mask": [1]}, "'input_ids' is no list of token ids"),
        ({"input_ids": [2**40], "loss_mask": [1]}, "'input_ids' is no list of token ids"),
        ({"input_ids": 3, "loss_mask": [1]}, "'input_ids' is no list of token ids"),
    ],
)
def test_rows_of_tokens_that_cannot_be_trained_on(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "d.jsonl", ["Hi", "Hello"], json.dumps(row))
    with pytest.raises(DataError, match=r"d\.jsonl:2: ") as error:
        load(path)
    assert message in str(error.value)
    assert load(path, on_error="skip").skipped == {"not a row of tokens": 1}


def test_a_mix_of_sources(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", *[["a", "b"]] * 2)
    two = write(tmp_path / "2.jsonl", *[["c", "d"]] * 20)
    data = DataConfig(train=(str(one), str(two)), mix=(1, 3))
    prompts = load_prompts(data, TOKENIZER, VOCAB, lambda source, _: open_source(source))
    answers = [str(TOKENIZER.decode(p.input_ids[p.loss_mask.bool()])) for p in prompts]
    assert "".join(answer[0] for answer in answers) == "ddbdddbddd"
