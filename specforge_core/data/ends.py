"""Where an answer ends: one set of tokens for regenerated answers, loss masks and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..documents import read_object
from ..errors import ConfigError, DataError
from ..target.weights import fetch
from ..types import TargetInfo
from .chat import Encoder

CHAT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def end_tokens(
    info: TargetInfo,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
) -> frozenset[int]:
    """Return every token that ends an answer.

    Those that config.json, generation_config.json and the tokenizer name, and the one that the
    chat template closes an answer with.  Servers stop at all of the first three.  Raises
    ConfigError for a name of one that is no token.
    """
    found = {
        "config.json": info.config.get("eos_token_id"),
        "generation_config.json": _generation_ends(info),
        "the tokenizer": tokenizer.eos_token_id,
        "the chat template": _template_end(tokenizer, template_kwargs or {}),
    }
    return frozenset(end for where, named in found.items() for end in _ids(where, named, info))


def _generation_ends(info: TargetInfo) -> object:
    if (path := fetch(info, "generation_config.json")) is None:
        return None
    try:
        return read_object(path).get("eos_token_id")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} is damaged: {exc}. Download it again") from exc


def _template_end(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> int | None:
    """Return the first of the special tokens behind an answer that the target would generate."""
    if not tokenizer.chat_template:
        return None
    encoder = Encoder(tokenizer, template_kwargs)
    with suppress(DataError):  # a template that wants more, or contradicts its generation prompt
        row = encoder.rows(CHAT)[-1]
        answer = [i for i, on in zip(row.input_ids, row.loss_mask, strict=True) if on]
        behind = list(takewhile(encoder.special.__contains__, reversed(answer)))
        return behind[-1] if behind else None
    return None


def _ids(where: str, named: object, info: TargetInfo) -> Iterator[int]:
    for token in named if isinstance(named, list | tuple) else [named]:
        if isinstance(token, int) and not isinstance(token, bool):
            if 0 <= token < info.vocab_size:  # others are never generated
                yield token
        elif token is not None:
            raise ConfigError(
                f"{where} of target {info.name_or_path!r} names {token!r:.40} as the token that "
                "ends an answer (eos_token_id): it must be a number, or a list of numbers"
            )
