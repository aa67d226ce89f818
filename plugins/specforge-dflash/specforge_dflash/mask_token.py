"""Which token stands for "not drafted yet": one that never occurs in text.

The rule, when `strategy.mask_token_id` is not set:

1. the first embedding row above every token of the tokenizer (many vocabularies are
   padded; the published drafts use this row too), else the highest row in a gap;
2. where every row is a token: the tokenizer's own mask token; else the lowest special
   token named reserved or unused; else the highest special token.  Tokens with a role
   (any `*_token_id` of the config or tokenizer) or part of the chat template are never taken.

Whatever is chosen, data in which it occurs is an error.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError, DataError
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.types import TargetInfo

REMEDY = "Try: strategy.mask_token_id=ID, a token that never occurs in your data"
CHOOSE = "Try: strategy.mask_token_id=null, which chooses a token that is no text"
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id")


def mask_token_occurs(token: int, given: int | None, where: str) -> str:
    """Say that the mask token, `given` or chosen, is not free to stand for unknown tokens."""
    what = f"{where} contains token {token}, which the draft reads as 'not drafted yet'"
    return f"{what}. {REMEDY if given is None else CHOOSE}"


def mask_token(given: int | None, target: TargetInfo) -> int:
    """Return the mask token's id: `strategy.mask_token_id`, or where that is not set a found one.

    Raises ConfigError when it is no token, and when none can be chosen safely.
    """
    if given is None:
        taken = [v for k, v in target.config.items() if k.endswith("_token_id")]
        flat = tuple(i for v in taken for i in (v if isinstance(v, list | tuple) else [v]))
        return _choose(
            target.name_or_path,
            target.revision,
            target.trust_remote_code,
            target.vocab_size,
            frozenset(i for i in flat if isinstance(i, int)),
        )
    if given >= target.vocab_size:
        raise ConfigError(
            f"strategy.mask_token_id {given} is no row of the target's "
            f"{target.vocab_size} embeddings. Try: strategy.mask_token_id={target.vocab_size - 1}"
        )
    return given


@lru_cache(maxsize=8)
def _choose(
    path: str, revision: str | None, trust: bool, vocab_size: int, roles: frozenset[int]
) -> int:
    target = TargetConfig(path=path, revision=revision, trust_remote_code=trust)
    try:
        tokenizer = load_tokenizer(target)
    except DataError as exc:
        raise ConfigError(
            f"no mask token can be chosen: {exc}, or strategy.mask_token_id=ID, a token that never "
            "occurs in your data"
        ) from exc
    return choose(tokenizer, vocab_size, roles)


def choose(tokenizer: Any, vocab_size: int, roles: frozenset[int]) -> int:
    """Apply the rule above to a transformers tokenizer and `vocab_size` embedding rows."""
    used: set[int] = set(tokenizer.get_vocab().values())
    first = max(used, default=-1) + 1
    if first < vocab_size:
        return first
    if free := set(range(vocab_size)) - used:
        return max(free)
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else " ".join(template.values())
    roles |= {i for role in ROLES if (i := getattr(tokenizer, role)) is not None}
    special: dict[int, str] = {
        i: str(token.content)
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in roles and i < vocab_size and token.content not in text
    }
    if tokenizer.mask_token_id in special:
        return int(tokenizer.mask_token_id)
    for i, content in special.items():
        if "reserved" in content or "unused" in content:
            return i
    if special:
        return max(special)
    raise ConfigError(
        f"every one of the {vocab_size} embedding rows is a token that may occur. {REMEDY}"
    )
