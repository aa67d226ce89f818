"""The target's tokenizer and chat template, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import DataConfig, TargetConfig
from ..errors import DataError
from ..text import cut
from .place import misread, runs_code, wrong_with

CLOCK = "strftime_now"  # what templates call for today's date
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # of strftime

# Tokenized for the fingerprint: digits, spaces, case and scripts, which tokenizers split unlike
PROBE = "Hello, world!  12345 + 67.8\n\n\tdef f(x):\r\n    return x  # naïve Ü 漢字 🙂 don't"


def load_tokenizer(target: TargetConfig) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer.  Raises DataError when there is none that can be used."""
    if said := misread(target.path):
        raise DataError(said)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            target.path, revision=target.revision, trust_remote_code=target.trust_remote_code
        )
        tokenizer(PROBE, add_special_tokens=False, verbose=False)  # some fail on use alone
    except MemoryError:
        raise
    except Exception as exc:  # whatever damaged files make the libraries raise
        if said := wrong_with(target.path) or runs_code(target, exc):
            raise DataError(said) from exc
        reason = cut(f"{type(exc).__name__}: {exc}", 500)
        raise DataError(
            f"target {target.path!r} has no tokenizer that can be loaded: {reason}. "
            "Try: target.path=DIRECTORY or a Hugging Face id"
        ) from exc
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of target {target.path!r} ({type(tokenizer).__name__}) cannot tell "
            "which characters a token covers. Save a tokenizer.json beside the model"
        )
    found: PreTrainedTokenizerBase = tokenizer
    return found


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source of the template conversations are rendered with."""
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so there is no "
            "telling how the target reads a conversation. Try: target.path= an instruct model, "
            "or put a chat_template.jinja beside the tokenizer"
        )
    return str(tokenizer.get_chat_template())


def template_options(data: DataConfig) -> dict[str, Any]:
    """Return what chat templates are rendered with: the user's arguments, and what time it is.

    The time is pinned: a row must not change from one day to the next.
    """
    return {**data.chat_template_kwargs, CLOCK: data.now}


def pinned_template(
    tokenizer: PreTrainedTokenizerBase, now: datetime, tools: list[dict[str, Any]] | None
) -> str | None:
    """Return the source of a chat template that takes `now` for the time; None if it reads none.

    In the template's own language, since transformers hands no functions on to templates.
    """
    chat_template(tokenizer)  # there is one; some tokenizers have another one for tools
    source = str(tokenizer.get_chat_template(tools=tools))
    if CLOCK not in source:
        return None
    names = [f"%{flag}{name}" for flag in ("", "-") for name in DIRECTIVES]
    values = [("%%", "\0"), *((name, now.strftime(name)) for name in names), ("\0", "%")]
    filters = "".join(f"|replace({name!r},{value!r})" for name, value in values)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{filters} }}}}{{%- endmacro +%}}{source}"


def template_fingerprint(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> str:
    """Return a sha256 of the chat template and its arguments; the clock counts if it is read."""
    source = chat_template(tokenizer)
    kwargs = {k: v for k, v in template_kwargs.items() if k != CLOCK or k in source}
    return _sha256([source, kwargs])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of the vocabulary, the special tokens, and how a probe text is split.

    Not of tokenizer.json: its spelling changes between versions of the libraries.
    """
    probe = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return _sha256([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, probe])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
