"""Conversations to token ids and loss masks, through the tokenizer's own chat template."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..target.tokenizer import CLOCK, chat_template, pinned_template
from .bounds import MEMORY, SECONDS, bounded_memory, bounded_time
from .sources import BadRow, Message
from .turns import Text, find_turns

CHARACTERS = 8  # of a token, more than most have: how much text is tokenized at first
MARGIN = 64  # tokens: those before the end of a cut text are those of the whole one
REFUSED = "refused by the chat template"


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized training row, or as much of it as was asked for; both lists are as long."""

    input_ids: list[int]
    loss_mask: list[int]  # 1 on what the assistant wrote, its end-of-turn token included
    length: int  # of the whole row, in tokens
    counted: bool  # False: it is longer than `length`


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a text begins with."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # of each token, in characters
    whole: bool  # there are no more


@dataclass(slots=True)
class Encoder:
    """Renders and tokenizes conversations, with work bounded by what is kept of one.

    `limit` is in tokens; `ends` are the tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any]
    limit: int | None = None
    ends: frozenset[int] = frozenset()
    special: frozenset[int] = field(init=False)  # tokens that are no text
    _options: dict[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        decoder = self.tokenizer.added_tokens_decoder
        self.special = frozenset(i for i, token in decoder.items() if token.special)

    def rows(self, messages: Sequence[Message]) -> list[Row]:
        """Tokenize a conversation and mark what the assistant wrote, up to `limit` tokens.

        Most templates give one row.  Where a template rewrites earlier turns, each turn is
        supervised in the row that shows what it was generated from.  Raises BadRow when the
        template refuses the conversation, or has no answer in it.
        """
        with _in_time():
            return [self._row(text) for text in find_turns(self.render, messages, _Beyond(self))]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize what the target reads before it answers.

        A prompt of `limit` tokens or more comes back with at least so many.
        """
        with _in_time():
            return self.tokens(self.render(messages, True)).ids

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return what the chat template writes, with its generation prompt or without."""
        if self._options is None:
            self._options = dict(self.template_kwargs)
            now = self._options.pop(CLOCK, None)
            if now is not None and (pinned := pinned_template(self.tokenizer, now)):
                self._options["chat_template"] = pinned
        chat_template(self.tokenizer)
        try:
            with bounded_memory(MEMORY):
                text = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt, **self._options
                )
        except TimeoutError:
            raise
        except Exception as exc:  # it is a program: it may divide by zero, or fill the memory
            raise BadRow(
                f"the chat template refuses the conversation: {_told(exc)}. "
                "Correct it, or set data.on_error=skip",
                REFUSED,
            ) from exc
        return str(text)

    def tokens(self, text: str) -> Tokens:
        """Tokenize a text: the whole of it, or more than `limit` tokens of its beginning."""
        wanted = len(text) if self.limit is None else self.limit + MARGIN
        size = CHARACTERS * wanted
        while size < len(text):
            found = self._tokenize(text[:size])
            if len(found.ids) >= wanted + MARGIN:
                return Tokens(found.ids[:wanted], found.offsets[:wanted], whole=False)
            size *= 4
        return self._tokenize(text)

    def _tokenize(self, text: str) -> Tokens:
        try:
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        except TimeoutError:
            raise
        except Exception as exc:  # a tokenizer's own, or half a surrogate pair from a template
            raise BadRow(
                f"the tokenizer refuses the text: {_told(exc)}. "
                "Correct it, or set data.on_error=skip",
                "refused by the tokenizer",
            ) from exc
        return Tokens(encoded["input_ids"], encoded["offset_mapping"], whole=True)

    def _row(self, text: Text) -> Row:
        found = self.tokens(text.text)
        mask = [0] * len(found.ids)
        for start, end in text.spans:
            # a token that also holds characters from outside the span is not the answer's
            first = bisect_left(found.offsets, start, key=itemgetter(0))
            last = bisect_right(found.offsets, end, lo=first, key=itemgetter(1))
            if found.whole or last < len(found.ids):
                last = self._end_of_turn(text.text, found, first, last)
            mask[first:last] = [1] * (last - first)
        kept = slice(0, self.limit)
        return Row(found.ids[kept], mask[kept], len(found.ids), found.whole and text.whole)

    def _end_of_turn(self, text: str, tokens: Tokens, first: int, last: int) -> int:
        """Return where the turn's last generated token ends.

        Generation stops at the end-of-turn token.  Templates write more after it: a line break,
        or (Phi-3) a line break and the end-of-text token.  Some (GLM-4) write none: there the
        role of the next turn is what ends this one.
        """

        def kind(index: int) -> str:
            start, end = tokens.offsets[index]
            if tokens.ids[index] in self.special:
                return "special"
            return "text" if text[start:end].strip() else "space"

        tail = last
        while tail > first and kind(tail - 1) != "text":
            tail -= 1
        for index in range(tail, last):
            if tokens.ids[index] in self.ends:
                return index + 1
        stop = tail
        while stop < last and kind(stop) == "space":
            stop += 1
        if stop == last:  # a template without an end-of-turn token
            following = tokens.ids[last : last + 1]
            return last + 1 if last > first and self.ends.intersection(following) else tail
        while stop < last and kind(stop) == "special":
            stop += 1
        return stop


class _Beyond:
    """Says whether a text has as many tokens as are kept; counts them only where it may."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._short = encoder.limit or 0  # characters that are sure to be fewer, or nearly

    def __call__(self, text: str) -> bool:
        limit = self._encoder.limit
        if limit is None or len(text) <= self._short:
            return False
        count = len(self._encoder.tokens(text).ids)
        self._short = max(len(text) * limit // max(count, 1), len(text) + limit // 8)
        return count >= limit + MARGIN // 2  # the last ones of a text may be other tokens in it


@contextmanager
def _in_time() -> Iterator[None]:
    """Raise BadRow where a row's work, most of it the template's, does not end in time."""
    try:
        with bounded_time(SECONDS):
            yield
    except TimeoutError as exc:
        raise BadRow(
            f"the chat template does not come to an end: {exc}. "
            "Correct it, or set data.on_error=skip",
            REFUSED,
        ) from exc


def _told(exc: Exception) -> str:
    text = " ".join(str(exc).split())[:200]
    return (
        text
        if isinstance(exc, TemplateError | TypeError | ValueError) and text
        else (f"{type(exc).__name__}: {text}".rstrip(": "))
    )
