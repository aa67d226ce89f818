"""A conversation, with the tools it offers, as the encoder reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .chat import Encoder
from .messages import Message, unread
from .sources import BadRow
from .tools import Tool


def encoder_for(
    encoder: Encoder, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> Encoder:
    """Return the encoder that gives the chat template a conversation's tools.

    Raises BadRow when the template writes no such thing as the conversation has.
    """
    template = str(encoder.tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None))
    if (name := unread(template, messages, tools)) is not None:
        raise BadRow(
            f"the conversation has {name!r}, which the target's chat template does not write. "
            f"To train without: data.ignore_fields=[{name}]; or data.on_error=skip",
            "not written by the chat template",
        )
    if not tools:
        return encoder
    return replace(encoder, template_kwargs={**encoder.template_kwargs, "tools": list(tools)})
