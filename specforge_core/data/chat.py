"""Conversations to token ids and loss masks, through the tokenizer's own chat template.

What the assistant wrote is found by rendering the conversation up to a turn
twice, once with the generation prompt in place of the turn and once with the
turn: the difference is what the target has to generate.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..target.tokenizer import chat_template
from .sources import Message


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized training row; both lists are as long."""

    input_ids: list[int]
    loss_mask: list[int]  # 1 on what the assistant wrote, its end-of-turn token included


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
) -> list[Row]:
    """Tokenize a conversation and mark what the assistant wrote.

    Most templates give one row.  Where a template rewrites earlier turns (drops
    their thinking), what the target reads differs from turn to turn, and each
    turn is supervised in the row that shows what it was generated from.
    Raises DataError when the template refuses the conversation, or has no answer in it.
    """
    turns = []  # the start of each answer, and the text up to its end
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:  # the first message answers nothing
            before = render(tokenizer, messages[:number], template_kwargs, prompt=True)
            text = render(tokenizer, messages[: number + 1], template_kwargs, prompt=False)
            if not text.startswith(before):
                raise _not_continued(number + 1, before, text)
            turns.append((len(before), text))
    if not turns:
        raise DataError("the conversation answers nothing, so there is nothing to train on")
    rows = []
    while turns:
        _, text = turns[-1]
        spans = [(start, len(upto)) for start, upto in turns if text.startswith(upto)]
        rows.append(_tokenize(tokenizer, text, spans))
        turns = [turn for turn in turns if not text.startswith(turn[1])]
    return rows[::-1]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
) -> list[int]:
    """Tokenize what the target reads before it answers."""
    text = render(tokenizer, messages, template_kwargs, prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    *,
    prompt: bool,
) -> str:
    """Return the conversation as text, with the generation prompt after it if `prompt`."""
    chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **template_kwargs
        )
    except (TemplateError, TypeError, ValueError) as exc:
        raise DataError(
            f"the chat template refuses the conversation: {exc}. "
            "Correct it, or set data.on_error=skip"
        ) from exc
    return str(text)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> Row:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def kind(index: int) -> str:
        start, end = offsets[index]
        if ids[index] in special:
            return "special"
        return "text" if text[start:end].strip() else "space"

    mask = [0] * len(ids)
    for start, end in spans:
        # a token that also holds characters from outside the span is not the answer's
        first = bisect_left(offsets, start, key=itemgetter(0))
        last = bisect_right(offsets, end, lo=first, key=itemgetter(1))
        last = _end_of_turn(kind, first, last)
        mask[first:last] = [1] * (last - first)
    return Row(ids, mask)


def _end_of_turn(kind: Callable[[int], str], first: int, last: int) -> int:
    """Return where the turn's last generated token ends.

    Generation stops at the end-of-turn token.  Templates write more after it: a
    line break, or (Phi-3) a line break and the end-of-text token.
    """
    tail = last
    while tail > first and kind(tail - 1) != "text":
        tail -= 1
    stop = tail
    while stop < last and kind(stop) == "space":
        stop += 1
    if stop == last:
        return tail  # a template without an end-of-turn token
    while stop < last and kind(stop) == "special":
        stop += 1
    return stop


def _not_continued(number: int, before: str, text: str) -> DataError:
    same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), None)
    same = min(len(before), len(text)) if same is None else same
    return DataError(
        f"message {number}: the chat template does not write an answer after its own generation "
        f"prompt: it asks with {before[same:][:40]!r} and writes {text[same:][:40]!r}. "
        "Try: data.chat_template_kwargs (such as {enable_thinking: false}), or data.on_error=skip"
    )
