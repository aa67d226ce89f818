"""The loss mask at its borders: limits, what ends an answer, and spaces before it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
)
from transformers import PreTrainedTokenizerFast

from specforge_core.config import DataConfig
from specforge_core.data.chat import Encoder
from specforge_core.errors import DataError
from specforge_core.target.tokenizer import (
    template_fingerprint,
    template_options,
)
from specforge_core.testing.toy import toy_tokenizer

from .chats import (
    CHAT,
    encode,
    encode_prompt,
    published,
    render,
    supervised,
)


@pytest.mark.parametrize("name", ["qwen2_5", "phi3", "gptoss"])
def test_a_limit_keeps_the_beginning_of_every_row(name: str) -> None:
    kwargs = {"model_identity": "x"} if name == "gptoss" else {}
    long = [*CHAT, {"role": "user", "content": "x y " * 20_000}, CHAT[1]]
    whole = encode(published(name), long, kwargs)
    for limit in (3, 40, 150, 200_000):
        found = Encoder(published(name), kwargs, limit).rows(long)
        expected = [(r.input_ids[:limit], r.loss_mask[:limit]) for r in whole]
        kept = [(r.input_ids, r.loss_mask) for r in found]
        supervised_rows = [pair for pair in expected if any(pair[1])]
        assert [pair for pair in kept if any(pair[1])] == supervised_rows
        for row, pair in zip(found, kept, strict=True):
            assert len(pair[0]) == min(limit, row.length)
    assert all(row.counted for row in whole)


def test_a_long_text_is_not_tokenized_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = published("qwen2_5")
    longest = 0
    call = type(tokenizer).__call__

    def measured(self: PreTrainedTokenizerFast, text: str, **options: object) -> object:
        nonlocal longest
        longest = max(longest, len(text))
        return call(self, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tokenizer), "__call__", measured)
    text = "the quick brown fox " * 100_000
    (row,) = Encoder(tokenizer, {}, 256).rows([CHAT[0], {"role": "assistant", "content": text}])
    assert len(row.input_ids) == 256
    assert sum(row.loss_mask) > 100
    assert row.length > 256
    assert not row.counted
    prompt = Encoder(tokenizer, {}, 256).prompt([{"role": "user", "content": text}])
    assert len(prompt) >= 256
    assert longest < 20_000


def test_an_answer_ends_at_the_first_token_that_ends_one() -> None:
    tokenizer = toy_tokenizer()
    im_end, mask = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|mask|>"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|im_end|><|mask|>{% endfor %}"
    )
    two = [CHAT[0], {"role": "assistant", "content": "yes"}]
    both, one = (
        Encoder(tokenizer, {}, None, frozenset(ends)).rows(two)[0] for ends in ([], [im_end])
    )
    assert sum(both.loss_mask) == sum(one.loss_mask) + 1
    assert [i for i, on in zip(one.input_ids, one.loss_mask, strict=True) if on][-1] == im_end
    assert both.input_ids[-1] == mask


def test_the_role_of_the_next_turn_ends_an_answer_where_the_target_says_so() -> None:
    """GLM-4 writes nothing behind an answer; its <|user|> is a token that ends one."""
    tokenizer = toy_tokenizer()
    user = tokenizer.convert_tokens_to_ids("<|mask|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|mask|>' if m['role'] == 'user' else '<|im_start|>' }}\n"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_start|>\n{% endif %}"
    )
    four = [CHAT[0], {"role": "assistant", "content": "yes"}] * 2
    (plain,) = Encoder(tokenizer, {}).rows(four)
    (ended,) = Encoder(tokenizer, {}, None, frozenset([user])).rows(four)
    assert supervised(tokenizer, plain) == ["yes", "yes"]
    # the last one, too: the target writes that token, whatever the template leaves out
    assert supervised(tokenizer, ended) == ["yes<|mask|>", "yes<|mask|>"]
    (broken_off,) = Encoder(tokenizer, {}, None, frozenset([user])).rows(four, cut={0, 1})
    assert supervised(tokenizer, broken_off) == ["yes", "yes"]


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen2_5", "phi3", "gptoss"])
def test_an_answer_that_was_cut_off_has_no_end(name: str) -> None:
    tokenizer, kwargs = published(name), {"model_identity": "x"} if name == "gptoss" else {}
    chat = [{**m, "content": m["content"].strip()} for m in CHAT]
    whole, cut = (
        [
            text
            for row in Encoder(tokenizer, kwargs).rows(chat, cut)
            for text in supervised(tokenizer, row)
        ]
        for cut in ((), {1})
    )
    assert whole[0] == cut[0]
    assert whole[1].startswith(cut[1])
    assert cut[1].endswith(chat[3]["content"])
    assert len(whole[1]) > len(cut[1])


PLAIN = (  # no special token before an answer, and prompts that end in a space
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKS = (  # Qwen3-style: opens the thoughts, and writes empty ones where there are none
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, PLAIN, THINKS])
@pytest.mark.parametrize("answer", ["\nhello", "  hello", "hello", "\t x", "1 2", "🙂", "\r\n\r\n"])
@pytest.mark.parametrize("question", ["x", "x \n", "two  "])
def test_no_token_holds_characters_of_prompt_and_answer(
    template: str | None, answer: str, question: str
) -> None:
    """A row is the prompt's tokens, as a server makes them, and then the answer's."""
    tokenizer = published("qwen2_5")
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 3
    encoder = Encoder(tokenizer, {}, None, frozenset([tokenizer.eos_token_id]))
    prompts = [encoder.prompt(chat[:n]) for n in (1, 3, 5)]
    found = []
    for row in encoder.rows(chat):
        where = [i for i, on in enumerate(row.loss_mask) if on]
        starts = [i for i in where if not row.loss_mask[i - 1]]
        for start in starts:
            stop = (
                row.loss_mask.index(0, start) if 0 in row.loss_mask[start:] else len(row.loss_mask)
            )
            found.append((row.input_ids[:start], row.input_ids[start:stop]))
    assert sorted(prompt for prompt, _ in found) == sorted(prompts)
    for prompt, ids in found:
        text = render(tokenizer, chat[: 1 + 2 * prompts.index(prompt)], {}, prompt=True)
        answered = render(tokenizer, chat[: 2 + 2 * prompts.index(prompt)], {}, prompt=False)
        assert tokenizer.decode(ids) == answered[len(text) :].removesuffix("\n")


def test_a_text_that_the_tokenizer_refuses() -> None:
    with pytest.raises(DataError, match="the tokenizer refuses the text"):
        Encoder(toy_tokenizer(), {}).tokens("half a pair: \ud800")


def test_today_in_a_template_is_the_date_of_the_config() -> None:
    plain, dated = toy_tokenizer(), toy_tokenizer()
    assert isinstance(dated.chat_template, str)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template
    default, pinned = (template_options(DataConfig(**now)) for now in ({}, {"now": "2026-11-27"}))
    text = dated.decode(encode_prompt(dated, CHAT[:1], pinned))
    assert str(text).startswith("27 Nov 2026<|im_start|>user")
    # only a template that reads the clock is another one on another date
    assert template_fingerprint(dated, default) != template_fingerprint(dated, pinned)
    assert template_fingerprint(dated, default) == template_fingerprint(
        dated, template_options(DataConfig())
    )
    assert template_fingerprint(plain, pinned) == template_fingerprint(plain, {})


@pytest.mark.parametrize("now", [2026, "2026", "today", "1999-12-31", "2026-13-01"])
def test_what_is_no_date(now: object) -> None:
    with pytest.raises(ValidationError, match="now"):
        DataConfig.model_validate({"now": now})


def sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the manner of Llama 2's: spaces are letters, and one goes in front."""
    pieces = [
        "<s>",
        "</s>",
        "▁",
        "\n",
        *"abcdefghijklmnopqrstuvwxyzINST[]/:",
        "▁h",
        "▁b",
        "he",
        "▁▁",
    ]
    merges = [("▁", "h"), ("▁", "b"), ("h", "e"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<s>", fuse_unk=False))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in pieces[:2]])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (  # the space is the answer's
            "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} "
            "[/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
            ["▁h", "i", "▁", "</s>"],
        ),
        (  # the space is the prompt's
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            ["h", "i", "</s>"],
        ),
    ],
)
def test_spaces_of_sentencepiece(template: str, pieces: list[str]) -> None:
    tokenizer = sentencepiece(template)
    chat = [{"role": "user", "content": "bob"}, {"role": "assistant", "content": "hi"}] * 2
    encoder = Encoder(tokenizer, {}, None, frozenset([1]))
    rows = encoder.rows(chat)
    for turn, row in enumerate(rows if len(rows) > 1 else rows * 2):
        prompt = encoder.prompt(chat[: 1 + 2 * turn])
        assert row.input_ids[: len(prompt)] == prompt
        answer = row.input_ids[len(prompt) : len(prompt) + len(pieces)]
        assert tokenizer.convert_ids_to_tokens(answer) == pieces
        assert all(row.loss_mask[len(prompt) : len(prompt) + len(pieces)])


@pytest.mark.parametrize("answer", ["\nhello", " hello", "hello", "1 2"])
def test_a_boundary_far_behind_the_last_special_token(answer: str) -> None:
    tokenizer = published("qwen2_5")
    tokenizer.chat_template = PLAIN.replace("<|im_end|>", "\n")
    chat = [{"role": "user", "content": "one two " * 99}, {"role": "assistant", "content": answer}]
    encoder = Encoder(tokenizer, {})
    prompts = [encoder.prompt((chat * 2)[:n]) for n in (1, 3)]
    found = [
        row.input_ids[:start]
        for row in encoder.rows(chat * 2)
        for start, on in enumerate(row.loss_mask)
        if on and not row.loss_mask[start - 1]
    ]
    assert sorted(found) == sorted(prompts)
