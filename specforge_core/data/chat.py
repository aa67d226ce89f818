"""Conversations to token ids and loss masks, through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..target.tokenizer import CLOCK, chat_template, pinned_template
from .answers import MARGIN, Marker, Row as Row, Tokens
from .bounds import MEMORY, SECONDS, bounded_memory, bounded_time
from .sources import BadRow, Message
from .turns import Text, find_turns, trained_on
from .written import (
    Shape,
    altered,
    as_parts,
    as_python,
    check_ends,
    left_out,
    lost_mark,
    marks_of,
    reads_parts,
    wants_parts,
    with_text_arguments,
)

CHARACTERS = 8  # of a token, more than most have: how much text is tokenized at first
REFUSED = "refused by the chat template"
AS_JSON = (
    "Put a chat_template.jinja beside the tokenizer that writes `arguments | tojson`, and serve "
    "with it"
)


@dataclass(slots=True)
class Encoder:
    """Renders and tokenizes conversations, with work bounded by what is kept of one.

    `limit` is in tokens; `ends` are the tokens that end an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any]
    limit: int | None = None
    ends: frozenset[int] = frozenset()
    # what the template was seen to write; shared with encoders of other tools
    written: set[Shape] = field(default_factory=set, repr=False, compare=False)
    special: frozenset[int] = field(init=False)  # tokens that are no text
    _stops: list[str] = field(init=False)  # those of them that end an answer, as they are written
    _options: dict[str, Any] | None = field(init=False, default=None)
    _parts: bool | None = field(init=False, default=None)  # texts are given as lists of parts
    _closes: list[int] | None = field(init=False, default=None)
    _last: tuple[str, Tokens] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        decoder = self.tokenizer.added_tokens_decoder
        self.special = frozenset(i for i, token in decoder.items() if token.special)
        self._stops = [decoder[token].content for token in sorted(self.ends & self.special)]

    def rows(self, messages: Sequence[Message], cut: Collection[int] = ()) -> list[Row]:
        """Tokenize a conversation and mark what the assistant wrote, up to `limit` tokens.

        Most templates give one row.  Where a template rewrites earlier turns, each turn is
        supervised in the row that shows what it was generated from.  `cut` are answers, counted
        from 0, that were broken off, and so have no end.  Raises BadRow when the template refuses
        the conversation, or has no answer in it.
        """
        marker = Marker(self.tokens, self.limit, self.ends, self.special, self._closing)
        with _in_time():
            texts = find_turns(self.render, messages, _Beyond(self, messages))
            self._check_written(messages, texts)
            _check_calls(messages, texts)
            return [row for text in texts for row in marker.rows(text, cut)]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokenize what the target reads before it answers.

        A prompt of `limit` tokens or more comes back with at least so many.
        """
        with _in_time():
            return list(self.tokens(self.render(messages, True)).ids)

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return what the chat template writes, with its generation prompt or without."""
        if self._options is None:
            self._options = dict(self.template_kwargs)
            now = self._options.pop(CLOCK, None)
            tools = self._options.get("tools")
            if now is not None and (pinned := pinned_template(self.tokenizer, now, tools)):
                self._options["chat_template"] = pinned
        chat_template(self.tokenizer)
        if self._parts is None:
            self._parts = False
            self._parts = reads_parts(self._source()) and wants_parts(self._whole)
        given = [as_parts(message) for message in messages] if self._parts else list(messages)
        try:
            with bounded_memory(MEMORY):
                text = self.tokenizer.apply_chat_template(
                    given, tokenize=False, add_generation_prompt=prompt, **self._options
                )
        except TimeoutError:
            raise
        except Exception as exc:  # it is a program: it may divide by zero, or fill the memory
            hint = self._joins(given, prompt) or self._raw(messages)
            raise BadRow(
                f"the chat template refuses the conversation: {_told(exc)}. "
                f"{hint}Correct it, or set data.on_error=skip",
                REFUSED,
            ) from exc
        return str(text)

    def _joins(self, messages: Sequence[Message], prompt: bool) -> str:
        """Say whether the template wants the arguments of calls as texts, which it joins."""
        given = [with_text_arguments(message) for message in messages]
        if given == messages:
            return ""
        with suppress(Exception), bounded_memory(MEMORY):
            self.tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=prompt, **(self._options or {})
            )
            return (
                "It joins the arguments of a call to a text, and servers give it an object, as is "
                f"done here. {AS_JSON}. Or: "
            )
        return ""

    def _raw(self, messages: Sequence[Message]) -> str:
        """Say which answer was copied from a target with its special tokens, if one was."""
        decoder = self.tokenizer.added_tokens_decoder
        special = sorted(decoder[token].content for token in self.special)
        for number, message in enumerate(messages, 1):
            found = [token for token in special if token in message["content"]]
            if found and message["role"] == "assistant":
                return (
                    f"Message {number} has {found[0]!r} in its text, which is a token of the "
                    "target. Try: specforge regenerate, which keeps the tokens that the target "
                    "wrote, and trains on these. Or: "
                )
        return ""

    def _source(self) -> str:
        tools = self.template_kwargs.get("tools")
        return str(self.tokenizer.get_chat_template(tools=tools))

    def _whole(self, messages: Sequence[Message]) -> str:
        return self.render(messages, False)

    def _check_written(self, messages: Sequence[Message], texts: Sequence[Text]) -> None:
        """Raise BadRow where the template leaves out a part of what the first answers are made of.

        A server would, too; but what was answered to it, or of it, would be trained on as if it
        had not been there.  Nor may an answer be written as another text.
        """
        answers = trained_on(messages)
        shown = 1 + max(max(text.answers, default=-1) for text in texts)
        marks = marks_of(self._source())
        options = self.template_kwargs
        found = left_out(self._whole, messages, answers[:shown], self.written, options, marks)
        for text in texts:
            for place, (start, end) in zip(text.answers, text.spans, strict=True):
                answer = messages[answers[place]]["content"]
                # a prompt may hold the answer's beginning
                if altered(answer, text.text[max(0, start - len(answer)) : end], marks):
                    found = found or (answers[place], "text as it is")
                elif (mark := lost_mark(answer, text.text[start:end], marks)) is not None:
                    found = found or (answers[place], f"mark {mark!r}")
                check_ends(answers[place], answer, self._stops)
        if found is not None:
            number, part = found
            raise BadRow(
                f"message {number + 1}: the target's chat template does not write its {part} "
                f"({messages[number]['role']}). Let the target answer itself: specforge "
                "regenerate, which keeps the tokens that it wrote; take that out of the row; or "
                "set data.on_error=skip",
                "not written by the chat template",
            )

    def tokens(self, text: str) -> Tokens:
        """Tokenize a text: the whole of it, or more than `limit` tokens of its beginning."""
        wanted = len(text) if self.limit is None else self.limit + MARGIN
        size = CHARACTERS * wanted
        if self._last is not None and self._last[0] == text:
            return self._last[1]
        while size < len(text):
            found = self._tokenize(text[:size])
            if len(found.ids) >= wanted + MARGIN:
                return Tokens(found.ids[:wanted], found.offsets[:wanted], whole=False)
            size *= 4
        self._last = text, self._tokenize(text)
        return self._last[1]

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

    def _closing(self) -> int | None:
        """Return the end token that the next turn begins with where answers have no own one."""
        if self._closes is None:
            chat: list[Message] = [{"role": "user", "content": "a"}]
            chat += [{"role": "assistant", "content": "b"}, *chat]
            found: list[int] = []
            with suppress(BadRow):
                answered, more = self.render(chat[:2], False), self.render(chat, False)
                if more.startswith(answered):
                    found = self.tokens(more[len(answered) :]).ids[:1]
            self._closes = [token for token in found if token in self.ends & self.special]
        return next(iter(self._closes), None)


class _Beyond:
    """Says whether a text has as many tokens as are kept; counts them only where it may."""

    def __init__(self, encoder: Encoder, messages: Sequence[Message]) -> None:
        self._encoder, self._messages = encoder, messages
        self._whole: str | None = None  # a text with fewer tokens than are kept
        self._short = encoder.limit or 0  # characters that are sure to be fewer, or nearly

    def __call__(self, text: str) -> bool:
        limit = self._encoder.limit
        if limit is None or len(text) <= self._short:
            return False
        if self._whole is None:
            self._whole = self._fitting()
        if self._whole.startswith(text):
            return False
        count = len(self._encoder.tokens(text).ids)
        self._short = max(len(text) * limit // max(count, 1), len(text) + limit // 8)
        return count >= limit + MARGIN // 2  # the last ones of a text may be other tokens in it

    def _fitting(self) -> str:
        """Return the text up to the last answer if all of it is kept: then no part is beyond.

        Its tokens are wanted next.
        """
        last = max(n for n, message in enumerate(self._messages) if message["role"] == "assistant")
        with suppress(BadRow):
            text = self._encoder.render(self._messages[: last + 1], False)
            if len(self._encoder.tokens(text).ids) < (self._encoder.limit or 0):
                return text
        return ""


def _check_calls(messages: Sequence[Message], texts: Sequence[Text]) -> None:
    """Raise BadRow where a call's arguments stand in an answer as Python, not JSON, spells them.

    A template that writes an object without a filter does so, and no target was taught that.
    """
    answers = trained_on(messages)
    for text in texts:
        for place, (start, end) in zip(text.answers, text.spans, strict=True):
            number = answers[place]
            if (python := as_python(messages[number], text.text[start:end])) is not None:
                raise BadRow(
                    f"message {number + 1}: the target's chat template writes the arguments of a "
                    f"call as Python does, {python:.80}, and not as JSON, which the target writes. "
                    f"{AS_JSON}; specforge regenerate keeps the tokens that the target writes; or "
                    "set data.on_error=skip",
                    "not JSON in the chat template",
                )


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
