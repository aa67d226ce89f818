"""Long conversations cost what is kept of them, and give what short ones give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from specforge_core.data import turns
from specforge_core.data.chat import Encoder
from specforge_core.data.sources import BadRow, Message
from specforge_core.testing.toy import toy_tokenizer

from .chats import SPECIAL, published

SYSTEM = {"role": "system", "content": "Be brief."}
KWARGS: dict[str, dict[str, Any]] = {
    "qwen3": {"enable_thinking": False},
    "gptoss": {"model_identity": "x"},
}


def chat(length: int, **special: Any) -> list[Message]:
    """Return user and assistant in turns; `special` are other contents by place: _7="..."."""
    return [
        {
            "role": "assistant" if i % 2 else "user",
            "content": special.get(f"_{i}", f"turn {i} " * (1 + i % 3)),
        }
        for i in range(length)
    ]


def rows(encoder: Encoder, found: Any) -> list[Any]:
    """Return the rows, or what is wrong with the conversation."""
    try:
        found = encoder.rows(found)
    except BadRow as exc:
        return [str(exc)]
    limit = encoder.limit or 1 << 40
    return [(row.input_ids, row.loss_mask, row.length > limit) for row in found]


def everywhere(monkeypatch: pytest.MonkeyPatch, encoder: Encoder, found: Any) -> list[Any]:
    """Encode with every turn rendered behind its own prompt."""
    with monkeypatch.context() as patch:
        patch.setattr(turns, "SHORT", 1 << 40)
        return rows(encoder, found)


@pytest.mark.parametrize(
    ("name", "system"),
    [
        (name, system)
        for name in SPECIAL
        for system in (False, True)
        if name != "deepseek_r1_distill" and (name, system) != ("gemma", True)  # refuse such
    ],
)
@pytest.mark.parametrize("limit", [None, 300])
def test_what_is_foretold_is_what_is_rendered(
    monkeypatch: pytest.MonkeyPatch, name: str, system: bool, limit: int | None
) -> None:
    found = [*([SYSTEM] if system else []), *chat(29, _11="", _13="  spaces  ", _20="again")]
    encoder = Encoder(published(name), KWARGS.get(name, {}), limit)
    expected = everywhere(monkeypatch, encoder, found)
    assert rows(encoder, found) == expected
    assert any(any(loss_mask) for _, loss_mask, _ in expected)


@pytest.mark.parametrize(
    "found",
    [
        chat(40, _15="<think>\nhm\n</think>\n\nyes"),
        chat(40, _39="<think>\nhm\n</think>\n\nyes"),
        [*chat(20), *chat(20)[1:]],  # two answers in a row
        [m for i, m in enumerate(chat(40)) if i != 16],  # two answers in a row, early
        [{"role": "assistant", "content": "Welcome"}, *chat(40)],
        [*chat(21), {"role": "user", "content": "and"}, *chat(20)[1:]],
        chat(41),
    ],
)
def test_conversations_that_are_not_plain(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    for name in ("qwen3", "qwen2_5", "llama3"):
        for limit in (None, 100, 300):
            encoder = Encoder(published(name), {}, limit)
            assert rows(encoder, found) == everywhere(monkeypatch, encoder, found)


@pytest.mark.parametrize(
    "template",
    [
        # keeps only the last messages; counts them; ends otherwise; looks back
        "{% for m in messages[-5:] %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ loop.index0 }}:{{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if loop.last else '.' }}"
        "{% endfor %}",
        "{% for m in messages %}{{ messages[loop.index0 - 9]['content'] }}|{{ m['content'] }}"
        "<|im_end|>{% endfor %}",
    ],
)
def test_templates_that_look_at_all_messages(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, {})
    expected = everywhere(monkeypatch, encoder, chat(40))
    assert rows(encoder, chat(40)) == expected


def test_messages_rendered_grow_with_the_turns_not_with_their_square() -> None:
    def rendered(length: int) -> int:
        count = 0

        def render(messages: Sequence[Message], prompt: bool) -> str:
            nonlocal count
            count += len(messages)
            return "".join(f"[{m['role']}]{m['content']}" for m in messages) + (
                "[assistant]" if prompt else ""
            )

        (text,) = turns.find_turns(render, chat(length), lambda _: False)
        assert len(text.spans) == length // 2
        assert text.text[slice(*text.spans[-1])] == chat(length)[-1]["content"]
        return count

    assert rendered(1600) < 40 * 1600
    assert rendered(1600) < 5 * rendered(400)


def test_no_turn_behind_what_is_kept_is_looked_at() -> None:
    asked: list[int] = []

    def render(messages: Sequence[Message], prompt: bool) -> str:
        asked.append(len(messages))
        return "".join(f"[{m['content']}" for m in messages) + ("[" if prompt else "")

    turns.find_turns(render, chat(10), lambda text: text.count("[") > 4)
    assert max(asked) == 5
