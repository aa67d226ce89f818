"""The loss mask, on chat templates as they are published (read from the files in trl's wheel)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    pre_tokenizers,
)

from specforge_core.config import TargetConfig
from specforge_core.data.chat import Encoder
from specforge_core.errors import DataError
from specforge_core.target.tokenizer import (
    load_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from specforge_core.testing.toy import toy_tokenizer

from .chats import (
    ANSWERS,
    CHAT,
    SMOLLM2,
    encode,
    encode_prompt,
    published,
    render,
    supervised,
)
from .templates import STYLES


@pytest.mark.parametrize(
    ("name", "end", "strips"),
    [
        ("llama3", "<|eot_id|>", True),
        ("gemma", "<end_of_turn>", True),
        ("qwen2_5", "<|im_end|>", False),
    ],
)
def test_spans_are_the_answers_and_their_end_of_turn_token(
    name: str, end: str, strips: bool
) -> None:
    tokenizer = published(name)
    answers = [a.strip() if strips else a for a in ANSWERS]

    (row,) = encode(tokenizer, CHAT, {})

    assert supervised(tokenizer, row) == [answer + end for answer in answers]
    assert tokenizer.decode(row.input_ids) == render(tokenizer, CHAT, {}, prompt=False)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is made by `make quickstart`")
def test_spans_of_smollm2() -> None:
    tokenizer = load_tokenizer(TargetConfig(path=str(SMOLLM2)))
    (row,) = encode(tokenizer, CHAT, {})
    assert supervised(tokenizer, row) == [answer + "<|im_end|>" for answer in ANSWERS]


def test_text_after_the_end_of_turn_token_is_not_supervised() -> None:
    """Phi-3 ends every rendering in the end-of-text token, so each turn is a row of its own."""
    tokenizer = published("phi3")
    rows = encode(tokenizer, CHAT, {})
    assert render(tokenizer, CHAT, {}, prompt=False).endswith("<|end|>\n<|endoftext|>")
    assert [supervised(tokenizer, row) for row in rows] == [[a + "<|end|>"] for a in ANSWERS]


def test_last_turn_that_ends_otherwise() -> None:
    """gpt-oss closes the last turn with another token than the turns of the history."""
    tokenizer = published("gptoss")
    rows = encode(tokenizer, CHAT, {"model_identity": "x"})
    assert [supervised(tokenizer, row) for row in rows] == [
        [f"<|channel|>final<|message|>{answer}<|return|>"] for answer in ANSWERS
    ]


def test_template_that_drops_earlier_thinking_gives_one_row_a_turn() -> None:
    tokenizer = published("qwen3")
    chat = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6", "reasoning_content": "also easy"},
    ]
    first, second = encode(tokenizer, chat, {})

    assert supervised(tokenizer, first) == ["<think>\neasy\n</think>\n\n4<|im_end|>"]
    assert supervised(tokenizer, second) == ["<think>\nalso easy\n</think>\n\n6<|im_end|>"]
    # the history of the second row is what the target reads when it answers: no thoughts
    prompt = encode_prompt(tokenizer, chat[:3], {})
    assert second.input_ids[: len(prompt)] == prompt
    assert "easy" not in tokenizer.decode(prompt)


def test_template_arguments_reach_the_template() -> None:
    tokenizer = published("qwen3")
    rows = encode(tokenizer, CHAT, {"enable_thinking": False})
    # the empty thoughts are now part of the prompt
    assert [supervised(tokenizer, row) for row in rows] == [
        [answer.lstrip("\n") + "<|im_end|>"] for answer in ANSWERS
    ]
    on, off = ({"enable_thinking": value} for value in (True, False))
    assert template_fingerprint(tokenizer, on) != template_fingerprint(tokenizer, off)
    assert template_fingerprint(tokenizer, on) == template_fingerprint(published("qwen3"), on)


def test_prompt_is_where_the_supervised_span_starts() -> None:
    tokenizer = published("llama3")
    (row,) = encode(tokenizer, CHAT, {})
    for turn, nth in ((1, 0), (3, 1)):
        prompt = encode_prompt(tokenizer, CHAT[:turn], {})
        assert row.input_ids[: len(prompt)] == prompt
        starts = [
            i for i, on in enumerate(row.loss_mask) if on and (not i or not row.loss_mask[i - 1])
        ]
        assert len(prompt) == starts[nth]


def test_template_that_contradicts_its_generation_prompt() -> None:
    tokenizer = published("deepseek_r1_distill")
    with pytest.raises(DataError) as error:
        encode(tokenizer, CHAT, {})
    assert "message 2: the chat template does not write an answer after its own" in str(error.value)
    assert r"it asks with '<think>\n' and writes 'Hello there" in str(error.value)
    assert "Try: data.chat_template_kwargs" in str(error.value)


def test_conversation_the_template_refuses() -> None:
    with pytest.raises(DataError, match=r"refuses the conversation: .* must alternate"):
        encode(published("gemma"), [CHAT[0], *CHAT], {})


def test_leading_assistant_turn_is_context() -> None:
    tokenizer = published("qwen2_5")
    (row,) = encode(tokenizer, CHAT[1:], {})
    assert supervised(tokenizer, row) == [ANSWERS[1] + "<|im_end|>"]
    with pytest.raises(DataError, match="the conversation answers nothing"):
        encode(tokenizer, CHAT[1:2], {})


def test_no_chat_template() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    for call in (encode, encode_prompt):
        with pytest.raises(DataError, match="has no chat template, so there is no telling"):
            call(tokenizer, CHAT, {})
    with pytest.raises(DataError, match=r"Try: target\.path= an instruct model"):
        template_fingerprint(tokenizer, {})


def test_load_tokenizer(toy_target: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TargetConfig(path=str(toy_target)))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(toy_tokenizer())
    with pytest.raises(DataError, match=r"has no config\.json: it is not a saved model"):
        load_tokenizer(TargetConfig(path=str(tmp_path)))


def test_tokenizer_fingerprint_sees_vocabulary_specials_and_splitting() -> None:
    plain = tokenizer_fingerprint(toy_tokenizer())
    longer, other_eos, splits = toy_tokenizer(), toy_tokenizer(), toy_tokenizer()
    longer.add_tokens(["<extra>"])
    other_eos.eos_token = "<|endoftext|>"
    splits.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found = {tokenizer_fingerprint(t) for t in (longer, other_eos, splits)}
    assert len(found | {plain}) == 4
    # padding is how a tokenizer is called, not what it is
    padded = toy_tokenizer()
    padded(["a", "bc"], padding=True)
    assert tokenizer_fingerprint(padded) == plain


def test_a_conversation_that_fits_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its prompts are beyond what is kept is known from the whole of it."""
    tokenizer = STYLES["chatml"].tokenizer()
    chat = [
        {"role": role, "content": "say the answer, think of the answer\n\n" * 9}
        for _ in range(4)
        for role in ("user", "assistant")
    ]
    whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
    count = len(tokenizer(whole)["input_ids"])
    assert len(whole) > 2 * count
    texts: list[str] = []
    tokenize = Encoder._tokenize

    def counted(self: Encoder, text: str) -> Any:
        texts.append(text)
        return tokenize(self, text)

    monkeypatch.setattr(Encoder, "_tokenize", counted)
    (row,) = Encoder(tokenizer, {}, count + 1).rows(chat)
    assert row.length == count
    assert [text for text in texts if whole.startswith(text)] == [whole]
    cut = Encoder(tokenizer, {}, count // 3).rows(chat)
    assert cut[0].input_ids == row.input_ids[: count // 3]
