"""Which conversations are trained on, and which are held out to validate with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import xxhash

from ..config import DataConfig
from ..errors import DataError
from .sources import Conversation, Rows, scan

SPACE = 1 << 64  # of the hashes


@dataclass(slots=True)
class Side:
    """One of the two sides of a run's conversations.

    What decides is the question (all messages up to the first of the user): several answers to
    one question, and a conversation that the data has twice, are on the same side, whatever
    else the data holds and in whichever order.
    """

    held_out: bool  # the side that is validated on
    fraction: float = 0.0  # of the questions that are held out
    questions: frozenset[int] = frozenset()  # that are held out in any case
    others: int = field(default=0, compare=False)  # conversations of the other side, so far
    nearest: int = field(default=SPACE - 1, compare=False)  # number of a question not held out

    def takes(self, found: Conversation) -> bool:
        """Say whether a conversation is on this side."""
        number = question(found)
        held_out = number in self.questions or number < self.fraction * SPACE
        if not held_out:
            self.nearest = min(self.nearest, number)
        return self.held_out == held_out

    @property
    def least(self) -> float | None:
        """Return the least fraction, in hundredths, that would hold out one conversation more.

        None where only all of them would.
        """
        hundredths = 100 * self.nearest // SPACE + 1
        return hundredths / 100 if hundredths < 100 else None

    def only(
        self, items: Iterable[Conversation | DataError], limit: int | None
    ) -> Iterator[Conversation | DataError]:
        """Yield this side's conversations, of the first `limit` of both."""
        count = 0
        for found in items:
            if not isinstance(found, Conversation):
                yield found
                continue
            if self.takes(found):
                yield found
            else:
                self.others += 1
            count += 1
            if count == limit:
                return

    @property
    def key(self) -> list[object]:
        """What tells the rows of this side from those of another split."""
        return [self.held_out, self.fraction, sorted(self.questions)]


def question(found: Conversation) -> int:
    """Return a number, the same for all conversations that begin with the same question."""
    roles = [message["role"] for message in found.messages]
    end = roles.index("user") + 1 if "user" in roles else len(roles)
    asked = list(found.messages[:end]) or found.row.get("input_ids")
    text = json.dumps([asked, list(found.tools)], sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def training_side(data: DataConfig, rows: Rows) -> Side | None:
    """Return the side that is trained on; None where nothing is held out.

    Reads the files of `data.validation`, so that none of their questions is trained on.
    """
    if isinstance(data.validation, float):
        return Side(held_out=False, fraction=data.validation)
    if not data.validation:
        return None
    found = scan(data.validation, data, rows, need_answer=True)
    asked = frozenset(question(one) for one in found if isinstance(one, Conversation))
    return Side(held_out=False, questions=asked)


def validation_side(data: DataConfig) -> tuple[DataConfig, Side | None]:
    """Return what is validated on, as if it were trained on, and the side of it.

    Raises DataError where nothing is held out.
    """
    if isinstance(data.validation, float):
        return data, Side(held_out=True, fraction=data.validation)
    if not data.validation:
        raise DataError("data.validation is not set. Try: data.validation=0.02")
    return data.model_copy(update={"train": data.validation, "mix": (), "limit": None}), None


def one_sided(side: Side, data: DataConfig) -> DataError:
    """Return the error for a side without a conversation."""
    if side.held_out:
        part = f"data.validation={side.least}, or " if side.least else ""
        return DataError(
            f"data.validation={data.validation} holds out none of {side.others} conversations. "
            f"Try: {part}a file of its own: data.validation=[FILE.jsonl]"
        )
    return DataError(
        f"all {side.others} conversations of data.train are held out by data.validation, and "
        "none is trained on. Try: a smaller part, or other files"
    )
