"""The tokens that a target read and wrote: `regenerate` writes them, training reads them back.

A template may rewrite an answer (drop its thoughts, refuse its channel tags), and text may be
tokenized in other ways than the target wrote it.  Ids that are known are what is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from ..target.tokenizer import template_fingerprint, tokenizer_fingerprint
from .answers import Row
from .messages import Message, chat_of
from .sources import BadRow
from .turns import trained_on

ROWS, FINISH, ORIGIN, RETOKENIZED = "token_rows", "finish_reason", "fingerprint", "retokenized"
FIELDS = (ROWS, FINISH, ORIGIN, RETOKENIZED)  # of a row that `regenerate` writes
CUT = {FINISH: "length", "stop_reason": "max_tokens"}  # what an answer that was cut has there
BOUND = 2**31  # token ids are kept in 32 bits
CALLED = {
    "target": "target's weights or config",
    "tokenizer": "tokenizer",
    "template": "chat template",
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tokens were made with."""

    target: str | None  # None where its weights are not here: a server has them
    tokenizer: str
    template: str  # its source alone: its arguments are in the tokens

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, target: str | None, known: str | None = None
    ) -> Fingerprint:
        """Take a tokenizer's, unless it is `known`, and its template's.

        That of a large vocabulary takes a third of a second.
        """
        own = known or tokenizer_fingerprint(tokenizer)
        return cls(target, own, template_fingerprint(tokenizer, {}))

    def as_json(self) -> dict[str, str | None]:
        return asdict(self)

    def differs(self, found: object) -> str | None:
        """Return what a row was made with otherwise; a target that either does not know may be."""
        for name, ours in self.as_json().items():
            theirs = found.get(name) if isinstance(found, Mapping) else None
            if theirs != ours and (name != "target" or (theirs and ours)):
                return name
        return None


def add_turn(rows: list[dict[str, list[int]]], prompt: list[int], answer: Sequence[int]) -> None:
    """Add what a target read and wrote: behind the last row where it read that, or as a new one."""
    known = len(rows[-1]["input_ids"]) if rows else 0
    if not rows or prompt[:known] != rows[-1]["input_ids"]:
        rows.append({"input_ids": [], "loss_mask": []})
        known = 0
    rows[-1]["input_ids"] += [*prompt[known:], *answer]
    rows[-1]["loss_mask"] += [0] * (len(prompt) - known) + [1] * len(answer)


def token_rows(row: Mapping[str, Any], expected: Fingerprint, limit: int | None) -> list[Row]:
    """Read the tokens of a row that `regenerate` wrote, up to `limit` of each sequence.

    Raises BadRow where they are damaged, or were not made by what `expected` says.
    """
    name = expected.differs(row.get(ORIGIN))
    if name is not None:
        origin = row.get(ORIGIN)
        theirs = origin.get(name) if isinstance(origin, Mapping) else None
        raise BadRow(
            f"its tokens were written with another {CALLED[name]} than this run's "
            f"({str(theirs)[:12]} there, {str(getattr(expected, name))[:12]} here). Answer the "
            "prompts with this target: specforge regenerate -c RUN.yaml -o NEW.jsonl; or train on "
            f"their text: data.ignore_fields=[{ROWS}]",
            "of another target",
        )
    found = row[ROWS]
    if not isinstance(found, list) or not found:
        raise _damaged(f"{ROWS!r} is no list of rows")
    return [_read(one, limit, _damaged) for one in found]


def token_row(row: Mapping[str, Any], limit: int | None) -> Row:
    """Read a row that is tokens alone: `input_ids` and a `loss_mask` of as many 0 and 1, or bools.

    Raises BadRow for anything else; whether the target has the tokens is seen by its reader.
    """
    return _read(row, limit, _bad_tokens)


# what trainers that ignore -100 have instead of a mask
LABELS = (
    ", and 'labels' are not read. Try: jq -c "
    "'{input_ids, loss_mask: (.labels | map(if . == -100 then 0 else 1 end))}' FILE > FILE.jsonl"
)


def _read(found: object, limit: int | None, bad: Callable[[str], BadRow]) -> Row:
    """Read one sequence; `bad` makes the error of what is wrong with it."""
    ids, mask = (
        found.get(name) if isinstance(found, Mapping) else None
        for name in ("input_ids", "loss_mask")
    )
    if not _are_ids(ids):
        raise bad("'input_ids' is no list of token ids")
    if not _is_mask(mask):
        given = isinstance(found, Mapping) and "labels" in found and mask is None
        raise bad(f"'loss_mask' is no list of 0 and 1{LABELS if given else ''}")
    if len(mask) != len(ids):
        raise bad(f"there are {len(ids)} input_ids, and a loss_mask of {len(mask)}")
    kept = list(map(int, mask[:limit]))  # true and false, as a table of bools has them
    return Row(ids[:limit], kept, len(ids), counted=True, blank=1 not in mask)


def _are_ids(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not value:
        return False
    return all(type(token) is int and 0 <= token < BOUND for token in value)


def _is_mask(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(on) in (int, bool) and on in (0, 1) for on in value)


def _bad_tokens(what: str) -> BadRow:
    return BadRow(f"{what}. Correct the row, or set data.on_error=skip", "not a row of tokens")


def _damaged(why: str) -> BadRow:
    return BadRow(
        f"{why}. Write it again with specforge regenerate, or set data.on_error=skip",
        "not as regenerate writes it",
    )


def cut_answers(
    row: Mapping[str, Any], messages: Sequence[Message], ignored: Collection[str] = ()
) -> frozenset[int]:
    """Return which answers that are trained on, counted from 0, were broken off by a limit.

    `regenerate` says so of each of them in a list; other data of a message, or of a row for its
    last one, as servers' responses do.  Fields that are `ignored` say nothing.
    """

    def broken_off(said: Mapping[str, Any]) -> bool:
        return any(said.get(name) == cut for name, cut in CUT.items() if name not in ignored)

    answers = trained_on(messages)
    if isinstance(reasons := row.get(FINISH), list) and FINISH not in ignored:
        return frozenset(i for i, reason in enumerate(reasons) if reason == "length")
    turns = chat_of(row) or ()
    first = len(messages) - len(turns)  # 1 with a system prompt that stands beside them
    cut = {i for i, n in enumerate(answers) if first in (0, 1) and broken_off(turns[n - first])}
    last = max(
        (n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0
    )
    if broken_off(row) and answers and answers[-1] == last:
        cut.add(len(answers) - 1)
    return frozenset(cut)
