"""Where the assistant's turns are in a rendered conversation.

What the assistant wrote is found by rendering the conversation up to a turn twice, once with the
generation prompt in place of the turn and once with the turn: the difference is what the target
has to generate.  That costs the square of the turns, so in a long conversation most are foretold
from short ones, and what was foretold is compared with the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import DataError
from .messages import Message, OnlyRead
from .sources import BadRow

Render: TypeAlias = Callable[[Sequence[Message], bool], str]  # with the generation prompt or not
SHORT = 16  # messages of a conversation that is rendered up to every turn


@dataclass(frozen=True, slots=True)
class Text:
    """One rendering, and the places [start, end) of the answers that it shows as generated."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answers: tuple[int, ...]  # which of the conversation's answers they are, counted from 0
    whole: bool = True  # False: the conversation goes on behind it


def trained_on(messages: Sequence[Message]) -> list[int]:
    """Return which messages are answers that are trained on; the first one answers nothing."""
    return [
        number
        for number, message in enumerate(messages)
        if number and message["role"] == "assistant" and not isinstance(message, OnlyRead)
    ]


def find_turns(
    render: Render, messages: Sequence[Message], beyond: Callable[[str], bool]
) -> list[Text]:
    """Return the texts that show every answer behind what it was generated from, in order.

    Most templates give one.  Where a template rewrites earlier turns (drops their thinking),
    what the target reads differs from turn to turn, and each turn is in the text that shows it.
    The first prompt that is `beyond` what is kept ends the last text.  Raises BadRow where there
    is no answer, or it does not follow its prompt.
    """
    answers = trained_on(messages)
    if not answers:
        marked = any(isinstance(m, OnlyRead) and m["role"] == "assistant" for m in messages)
        what = "marks no answer as trained on (weight, train)" if marked else "answers nothing"
        raise BadRow(
            f"the conversation {what}, so there is nothing to train on. Take it out, or "
            "set data.on_error=skip",
            "without an answer",
        )
    if len(messages) > SHORT:
        with suppress(DataError):  # said again, and better, where every turn is rendered
            if (found := _foretell(render, messages, answers, beyond)) is not None:
                return [found]
    # of each answer: which it is, its start, and the text up to its end
    turns: list[tuple[int, int, str]] = []
    whole = True
    for place, number in enumerate(answers):
        before = render(messages[:number], True)
        if beyond(before):
            turns.append((place, len(before), before))
            whole = False
            break
        text = render(messages[: number + 1], False)
        if not text.startswith(before):
            raise _not_continued(number + 1, before, text)
        turns.append((place, len(before), text))
    texts = []
    while turns:
        text = turns[-1][2]
        shown = [
            (place, (start, len(upto)))
            for place, start, upto in turns
            if text.startswith(upto) and start < len(upto)
        ]
        spans, places = tuple(span for _, span in shown), tuple(place for place, _ in shown)
        texts.append(Text(text, spans, places, whole))
        whole = True  # all but the last text
        turns = [turn for turn in turns if not text.startswith(turn[2])]
    return texts[::-1]


def _foretell(
    render: Render,
    messages: Sequence[Message],
    answers: Sequence[int],
    beyond: Callable[[str], bool],
) -> Text | None:
    """Return the one text of a conversation whose turns do not change earlier ones; else None.

    What stands between two answers, and the second of them, are read off a short conversation:
    the first messages and the last ones.  Together they must be the whole text, and every 2^i-th
    answer is also rendered behind its own prompt, which costs a few renderings of all in sum.
    """
    whole = render(messages[: answers[-1] + 1], False)
    spans: list[tuple[int, int]] = []
    for place, number in enumerate(answers):
        end = spans[-1][1] if spans else 0
        found: list[tuple[int, int] | None] = []
        if (near := _near(messages, answers, place)) is not None:
            asked = (*near, *messages[answers[place - 1] + 1 : number])
            found.append(_place(render, near, asked, messages[number], whole, end))
        if near is None or place & (place - 1) == 0:
            found.append(_place(render, (), messages[:number], messages[number], whole, 0))
        if (span := found[0]) is None or span != found[-1] or span[0] < end:
            return None
        if beyond(whole[: span[0]]):
            return Text(whole, tuple(spans), tuple(range(place)))
        spans.append(span)
    if spans[-1][1] != len(whole):
        return None
    return Text(whole, tuple(spans), tuple(range(len(spans))))


def _near(
    messages: Sequence[Message], answers: Sequence[int], place: int
) -> tuple[Message, ...] | None:
    """Return the first messages and those of the last exchange before the `place`-th answer.

    None where there are hardly more.  Templates want user and assistant to take turns.
    """
    if place < 2:
        return None
    begin, end = answers[place - 2] + 1, answers[place - 1] + 1
    head = 2 + (messages[0]["role"] == "system")  # what templates look at: who begins
    if begin - head < 4 or (begin - head) % 2:
        return None
    return (*messages[:head], *messages[begin:end])


def _place(
    render: Render,
    known: Sequence[Message],
    asked: Sequence[Message],
    answer: Message,
    whole: str,
    offset: int,
) -> tuple[int, int] | None:
    """Return where an answer starts and ends in `whole`; None where it does not stand so there.

    The messages of `known`, which `asked` begins with, end at `offset` of `whole`.
    """
    behind = render(known, False) if known else ""
    before, text = render(asked, True), render((*asked, answer), False)
    if not (before.startswith(behind) and text.startswith(before)):
        return None
    if not whole.startswith(text[len(behind) :], offset):
        return None
    return offset + len(before) - len(behind), offset + len(text) - len(behind)


def _not_continued(number: int, before: str, text: str) -> BadRow:
    same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), None)
    same = min(len(before), len(text)) if same is None else same
    return BadRow(
        f"message {number}: the chat template does not write an answer after its own generation "
        f"prompt: it asks with {before[same:][:40]!r} and writes {text[same:][:40]!r}. "
        "Try: data.chat_template_kwargs (such as {enable_thinking: false}), specforge regenerate, "
        "which keeps the tokens that the target wrote, or data.on_error=skip",
        "refused by the chat template",
    )
