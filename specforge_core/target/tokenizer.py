"""The target's tokenizer and chat template, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import TargetConfig
from ..errors import DataError
from ..text import cut

# Tokenized for the fingerprint: digits, spaces, case and scripts, which tokenizers split unlike
PROBE = "Hello, world!  12345 + 67.8\n\n\tdef f(x):\r\n    return x  # naïve Ü 漢字 🙂 don't"


def load_tokenizer(target: TargetConfig) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer.  Raises DataError when there is none that can be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            target.path, revision=target.revision, trust_remote_code=target.trust_remote_code
        )
        tokenizer(PROBE, add_special_tokens=False, verbose=False)  # some fail on use alone
    except MemoryError:
        raise
    except Exception as exc:  # whatever damaged files make the libraries raise
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


def template_fingerprint(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> str:
    """Return a sha256 of the chat template and its arguments."""
    return _sha256([chat_template(tokenizer), dict(template_kwargs)])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of the vocabulary, the special tokens, and how a probe text is split.

    Not of tokenizer.json: its spelling changes between versions of the libraries.
    """
    probe = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return _sha256([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, probe])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
