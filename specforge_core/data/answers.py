"""What is supervised in a rendered conversation: the tokens that the target would generate.

The boundary between a prompt and its answer is one of tokens.  A server tokenizes the prompt
alone, so no token of a row may hold characters of both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import itemgetter

from .turns import Text

MARGIN = 64  # tokens: those before the end of a cut text are those of the whole one
LEADS = ("\n", "x", "")  # behind one of them an answer is tokenized as behind a prompt


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenized training row, or as much of it as was asked for; both lists are as long."""

    input_ids: list[int]
    loss_mask: list[int]  # 1 on what the assistant wrote, its end-of-turn token included
    length: int  # of the whole row, in tokens
    counted: bool  # False: it is longer than `length`
    blank: bool = False  # a `loss_mask` of its own has no 1, behind what was asked for neither


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a text begins with."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # of each token, in characters
    whole: bool  # there are no more


@dataclass(frozen=True, slots=True)
class Marker:
    """Makes rows of rendered texts."""

    tokenize: Callable[[str], Tokens]  # more than `limit` tokens, or all
    limit: int | None  # tokens of a row that are kept
    ends: frozenset[int]  # tokens that end an answer
    special: frozenset[int]  # tokens that are no text
    closing: Callable[
        [], int | None
    ]  # the end of an answer that the template leaves to the next turn

    def rows(self, text: Text, cut: Collection[int]) -> list[Row]:
        """Return the rows of one text; answers in `cut` were broken off and have no end.

        One row, and one more for each answer whose prompt, tokenized alone, is not what the
        text's tokens begin with.
        """
        found = self.tokenize(text.text)
        ids, mask = list(found.ids), [0] * len(found.ids)
        apart: list[Row] = []
        stop = len(ids)
        for (start, end), answer in zip(text.spans, text.answers, strict=True):
            first = bisect_left(found.offsets, start, key=itemgetter(0))
            if first == len(ids):
                break
            if not self._as_served(text.text, found, start, first):
                apart += self._apart(text, start, end, finished=answer not in cut)
                stop = max((i + 1 for i, on in enumerate(mask) if on), default=0)
                continue
            # a token that also holds characters from behind the answer is not the answer's
            last = bisect_right(found.offsets, end, lo=first, key=itemgetter(1))
            if found.whole or last < len(ids):
                finished = answer not in cut
                last, closing = self._end(text.text, found, first, last, finished=finished)
                if closing is not None and end == len(text.text):
                    ids, mask = [*ids, closing], [*mask, 1]
            mask[first:last] = [1] * (last - first)
            stop = len(ids)
        if not apart or stop:
            row = Row(ids[:stop], mask[:stop], len(ids), found.whole and text.whole)
            apart.append(self._kept(row))
        return apart

    def _kept(self, row: Row) -> Row:
        kept = slice(0, self.limit)
        return Row(row.input_ids[kept], row.loss_mask[kept], row.length, row.counted)

    def _as_served(self, text: str, found: Tokens, start: int, first: int) -> bool:
        """Say whether the tokens before `first` are those of text[:start] alone.

        From the last special token on, at which tokenizers split texts, or a few tokens.
        """
        begin = first - 1
        while begin > max(0, first - MARGIN) and found.ids[begin] not in self.special:
            begin -= 1
        if begin < 0:
            return True
        alone = self.tokenize(text[found.offsets[begin][0] : start]).ids
        expected = found.ids[begin:first]
        if begin and found.ids[begin] not in self.special:  # the first ones lack what was before
            alone, expected = alone[-MARGIN // 2 :], expected[-MARGIN // 2 :]
        return alone == expected

    def _apart(self, text: Text, start: int, end: int, *, finished: bool) -> list[Row]:
        """Return a row of the prompt as served, and the answer's tokens behind it."""
        prompt = self.tokenize(text.text[:start])
        if not prompt.whole or (self.limit is not None and len(prompt.ids) >= self.limit):
            return []
        tokens = self._alone(text.text[start:end])
        last = len(tokens.ids)
        closing = None
        if tokens.whole:
            last, closing = self._end(text.text[start:end], tokens, 0, last, finished=finished)
        answer = [*tokens.ids[:last], *([] if closing is None else [closing])]
        ids = [*prompt.ids, *answer]
        mask = [0] * len(prompt.ids) + [1] * len(answer)
        return [self._kept(Row(ids, mask, len(ids), tokens.whole))] if answer else []

    def _alone(self, answer: str) -> Tokens:
        """Tokenize an answer as what follows a prompt: without a space put in front of it."""
        for lead in LEADS:
            found = self.tokenize(lead + answer)
            first = bisect_left(found.offsets, len(lead), key=itemgetter(0))
            if not first or found.offsets[first - 1][1] <= len(lead):
                break
        offsets = [(start - len(lead), end - len(lead)) for start, end in found.offsets[first:]]
        return Tokens(found.ids[first:], offsets, found.whole)

    def _end(
        self, text: str, tokens: Tokens, first: int, last: int, *, finished: bool
    ) -> tuple[int, int | None]:
        """Return where an answer's last generated token ends, and the end that is not in the text.

        Generation stops at the end-of-turn token.  Templates write more after it: a line break,
        or (Phi-3) a line break and the end-of-text token.  Some (GLM-4) write none: there the
        role of the next turn is what ends this one.
        """

        def kind(index: int) -> str:
            start, end = tokens.offsets[index]
            if tokens.ids[index] in self.special:
                return "special"
            return "text" if text[start:end].strip() else "space"

        tail = last
        while tail > first and kind(tail - 1) != "text":
            tail -= 1
        if not finished:
            return next((i for i in range(tail, last) if kind(i) == "special"), tail), None
        for index in range(tail, last):
            if tokens.ids[index] in self.ends:
                return index + 1, None
        stop = tail
        while stop < last and kind(stop) == "space":
            stop += 1
        if stop == last:  # a template without an end-of-turn token
            if last == first:
                return tail, None
            following = tokens.ids[last : last + 1]
            if following:
                return (last + 1 if following[0] in self.ends else tail), None
            closing = self.closing()
            return (tail if closing is None else last), closing
        while stop < last and kind(stop) == "special":
            stop += 1
        return stop, None
