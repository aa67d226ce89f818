"""One conversation to rows of tokens, or a row that is tokens already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat import Encoder, Row
from .messages import Message
from .sources import BadRow, Conversation
from .tokenrows import ROWS, Fingerprint, cut_answers, token_row, token_rows
from .tools import Tool
from .written import spelled, unread


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes the rows of a conversation, in this process or another."""

    encoder: Encoder
    origin: Fingerprint  # of this run: tokens that a target wrote must be of the same
    ignored: tuple[str, ...] = ()  # fields of rows and of messages that are not read

    def __call__(self, found: Conversation) -> list[Row]:
        """Return a conversation's rows, of the tokens that it says or of its text.

        Raises BadRow.
        """
        if not found.messages:
            return [token_row(found.row, self.encoder.limit)]
        if found.row.get(ROWS) is not None and ROWS not in self.ignored:
            return token_rows(found.row, self.origin, self.encoder.limit)
        encoder = encoder_for(self.encoder, found.messages, found.tools, found.row)
        return encoder.rows(found.messages, cut_answers(found.row, found.messages, self.ignored))


def encoder_for(
    encoder: Encoder, messages: Sequence[Message], tools: Sequence[Tool], row: Mapping[str, Any]
) -> Encoder:
    """Return the encoder that gives the chat template a conversation's tools.

    Raises BadRow, with the field's name in the `row`, when the template writes no such thing as
    the conversation has.
    """
    offered = [dict(tool) for tool in tools]
    template = str(encoder.tokenizer.get_chat_template(tools=offered or None))
    if (name := unread(template, messages, tools)) is not None:
        names = spelled(row, name)
        raise BadRow(
            f"the conversation has {' and '.join(map(repr, names))}, which the target's chat "
            "template does not write. "
            f"To train without: data.ignore_fields=[{', '.join(names)}]; or data.on_error=skip",
            "not written by the chat template",
        )
    return offering(encoder, tools)


def offering(encoder: Encoder, tools: Sequence[Tool]) -> Encoder:
    """Return the encoder that gives the chat template these tools."""
    if not tools:
        return encoder
    offered = [dict(tool) for tool in tools]
    return replace(encoder, template_kwargs={**encoder.template_kwargs, "tools": offered})
