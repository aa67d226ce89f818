"""Which rows can be trained on, and what is said of those that cannot."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..config import DataConfig, RunConfig
from ..errors import DataError
from .answers import Row
from .sources import Skipped, told

UNSUPERVISED, TOO_LONG = "without a supervised token", "too long"
UNFINISHED = "unfinished"  # an answer of regenerate.max_new_tokens
BEYOND = "without an answer in"  # and what bounds it


def left_out(row: Row, data: DataConfig, limit: int, where: str) -> str | None:
    """Return why a row is not trained on, if it is not; `data.too_long` may make it an error."""
    if row.blank:  # a longer one would be no better
        return UNSUPERVISED
    if row.length > limit and data.too_long == "raise":
        raise DataError(_too_long(row, data, limit, where))
    if row.length > limit and data.too_long == "skip":
        return TOO_LONG
    if not any(row.loss_mask):
        if row.length <= limit:
            return UNSUPERVISED
        bound = "the target's positions" if limit < data.max_length else "data.max_length"
        return f"{BEYOND} {bound}"
    return None


def nothing_supervised(used: int, skipped: Skipped, data: DataConfig, limit: int) -> DataError:
    """Return the error for conversations of which no token is trained on, with the reason."""
    said = f"none of {used} conversations has a token to train on ({told(skipped.counts)})"
    if not any(reason.startswith((TOO_LONG, BEYOND)) for reason in skipped.counts):
        return DataError(
            f"{said}: their loss_mask is 0 everywhere, or their answers are empty. Correct them: "
            "1 stands on each token that the target wrote"
        )
    if limit < data.max_length:
        return DataError(f"{said}. The target takes {limit} tokens. Try: shorter conversations")
    cut = ", or data.too_long=truncate" if data.too_long == "skip" else ""
    return DataError(f"{said}. Try: data.max_length={2 * limit}{cut}, or other data")


def nothing_answered(output: Path, reasons: Collection[str], run: RunConfig) -> DataError:
    """Return the error for prompts of which none has an answer, with what may give them some."""
    tries = {
        TOO_LONG: f"data.max_length={2 * run.data.max_length}, or shorter prompts",
        UNFINISHED: f"regenerate.max_new_tokens={2 * run.regenerate.max_new_tokens}, or "
        "regenerate.keep_unfinished=true",
    }
    found = [text for reason, text in tries.items() if reason in reasons]
    return DataError(
        f"no prompt has an answer, so there is no {str(output)!r} to train on; "
        f"{f'{output}.dropped'!r} says why for each"
        + (f". Try: {', and '.join(found)}" if found else "")
    )


def bound_of(data: DataConfig, limit: int) -> str:
    """Return what makes `limit` the longest row: the config, or the target."""
    if limit < data.max_length:
        return f"the target's {limit} positions"
    return f"data.max_length={limit} tokens"


def _too_long(row: Row, data: DataConfig, limit: int, where: str) -> str:
    length = f"{row.length}" if row.counted else f"more than {row.length}"
    larger = row.counted and limit == data.max_length
    longer = f"data.max_length={row.length}, or " if larger else ""
    return (
        f"{where}: {length} tokens, longer than {bound_of(data, limit)}. "
        f"Try: {longer}data.too_long=truncate (or skip)"
    )


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raise DataError where a token is not in the target's vocabulary."""
    if max(ids) >= vocab_size:
        raise DataError(
            f"{where}: token id {max(ids)} is beyond the target's vocabulary of {vocab_size}, so "
            "tokenizer and model do not belong together. Try: target.path=, a directory with both"
        )
