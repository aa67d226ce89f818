"""Answers written by the target itself, so that a draft learns to predict that target."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..devices import pick_device
from ..errors import CaptureError, DataError
from ..progress import track
from ..strategy import Strategy
from ..target.fingerprint import target_fingerprint
from ..target.info import load_target_info
from ..target.tokenizer import CLOCK, chat_template, load_tokenizer, template_options
from ..text import counted
from .chat import Encoder
from .files import to_train_on
from .journal import Journal
from .messages import OnlyRead
from .respond import TOO_LONG, Answerer, Chat, Task, asked_turns
from .rows import encoder_for
from .sources import (
    BadRow,
    Conversation,
    Rows,
    Skipped,
    nothing_left,
    read_conversations,
    told,
)
from .split import Side
from .tokenrows import FIELDS, FINISH, ORIGIN, RETOKENIZED, ROWS, Fingerprint
from .usable import nothing_answered

IN_PROCESS = "transformers"  # the engine that has the weights here


@dataclass(frozen=True, slots=True)
class RegenerateReport:
    """What one call did."""

    output: Path
    num_prompts: int
    num_written: int  # conversations, by this call
    num_before: int  # conversations and dropped prompts found on resuming
    dropped: Mapping[str, int]  # reason -> prompts, by this call
    skipped: Mapping[str, int]  # reason -> bad lines, with data.on_error=skip
    num_tokens: int  # in the answers
    num_retokenized: int  # conversations whose answers came as text
    seconds: float

    def check(self, run: RunConfig) -> None:
        """Raise DataError where no call has answered any prompt: there is nothing to go on with."""
        if not self.output.exists():
            raise nothing_answered(self.output, self.dropped, run)

    def __str__(self) -> str:
        dropped = "".join(f", {count} dropped ({why})" for why, count in self.dropped.items())
        before = f", {self.num_before} were there before" if self.num_before else ""
        bad = counted(sum(self.skipped.values()), "bad line")
        lines = f", {bad} skipped ({told(self.skipped)})"
        skipped = lines if self.skipped else ""
        if self.num_retokenized:
            skipped += f", {self.num_retokenized} tokenized anew (the server gives no token ids)"
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.output}: {self.num_written} of {counted(self.num_prompts, 'prompt')} answered"
            f"{dropped}{before}{skipped}; {counted(self.num_tokens, 'token')}, {rate:.1f} tokens/s"
        )


def regenerate(run: RunConfig, strategy: Strategy, output: Path) -> RegenerateReport:
    """Answer the user turns of `regenerate.prompts` and append the conversations to `output`.

    A row is {"id", "messages", the prompt row's other fields, "model", "sampling",
    "fingerprint", "finish_reason" of each answer, "token_rows"}: what the target read and
    wrote, which is what is trained on.
    Calling it again goes on where it stopped, and draws as one run would have; prompts
    whose first answer was not kept are remembered in `output`.dropped.  Raises DataError
    for bad prompts, and for an output of another model or sampling, and what the engine
    raises; what was written stays.
    """
    start = time.perf_counter()
    tokenizer = load_tokenizer(run.target)
    tasks, skipped = read_tasks(run, tokenizer, strategy.conversations)
    origin = origin_of(run, tokenizer)
    dropped = Counter[str]()
    written = num_tokens = retokenized = 0
    with (
        Journal(output) as answers,
        Journal(output.with_name(output.name + ".dropped")) as refused,
        track("answering prompts", len(tasks)) as progress,
        ExitStack() as stack,
    ):
        done = _ids(answers, origin)
        try:
            done |= _ids(refused, origin, run.data.max_length)
        except OtherOrigin:
            if done:
                raise
            refused.clear()  # of an output that was taken away
        left = [task for task in tasks if task.id not in done]
        progress.skip(before := len(tasks) - len(left))
        if left:
            device = pick_device(run.target.device, "target.device")
            engine = strategy.target_engine(run.target, device)
            stack.callback(engine.close)
            answerer = Answerer(run, tokenizer, engine)
            for chat in stack.enter_context(closing(answerer.answer(left))):
                task = chat.task
                if chat.messages:
                    answers.append([answered(chat, origin)])
                    written += 1
                    retokenized += chat.retokenized
                else:
                    reason = {"reason": chat.dropped, "max_length": run.data.max_length}
                    refused.append([{"id": task.id, **reason, **origin}])
                    dropped[str(chat.dropped)] += 1
                num_tokens = answerer.num_tokens
                progress.advance(note=f"{num_tokens / (answerer.seconds or 1):.1f} tokens/s")
    seconds = time.perf_counter() - start
    return RegenerateReport(
        output, len(tasks), written, before, dropped, skipped, num_tokens, retokenized, seconds
    )


def answered(chat: Chat, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written of an answered conversation."""
    return {
        "id": chat.task.id,
        "messages": [
            {**message, "train": False} if isinstance(message, OnlyRead) else message
            for message in chat.messages
        ],
        **chat.task.metadata,
        **origin,
        FINISH: chat.finish_reasons,
        **({RETOKENIZED: True} if chat.retokenized else {}),
        ROWS: chat.token_rows,
    }


def read_tasks(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: Rows, side: Side | None = None
) -> tuple[list[Task], Mapping[str, int]]:
    """Read all prompts, of a `side` only its own; count the bad lines skipped by reason."""
    chat_template(tokenizer)
    files = tuple(map(str, run.regenerate.prompts))
    if not files:
        raise DataError("regenerate.prompts names no file. Try: regenerate.prompts=[PROMPTS.jsonl]")
    encoder = Encoder(tokenizer, template_options(run.data), run.data.max_length)
    tasks: dict[str, Task] = {}
    sources: dict[str, str] = {}  # of each id
    skipped, held_out = Skipped(run.data.on_error), 0
    rows = to_train_on(rows, "regenerate.prompts")
    for found in read_conversations(files, run.data, rows, need_answer=False, skipped=skipped):
        if side is not None and not side.takes(found):
            held_out += 1
            continue
        name = _name(found, sources)
        if name in tasks:
            skipped.add(
                BadRow(
                    f"{found.where} has the id {name!r:.80} of {tasks[name].where}; ids tell what "
                    "is done. Give every prompt its own id, or set data.on_error=skip",
                    "repeated id",
                )
            )
            continue
        try:
            tasks[name] = _task(found, name, len(tasks), encoder)
        except BadRow as exc:
            skipped.add(exc.at(found.where))
            continue
        sources[name] = found.source
        if len(tasks) == run.data.limit:
            break
    if not tasks and held_out:
        raise DataError(
            f"data.validation holds out all {held_out} conversations of regenerate.prompts "
            f"({', '.join(files)}): none is left to be answered. Name other prompts"
        )
    if not tasks:
        raise nothing_left(files, skipped.first)
    return list(tasks.values()), skipped.counts


def _name(found: Conversation, sources: Mapping[str, str]) -> str:
    """Return a prompt's id: its own, which files may have in common, or its place."""
    given = found.row.get("id")
    name = found.where if given is None else str(given)
    if sources.get(name, found.source) != found.source:  # two files that both count from 0
        name = f"{found.source}/{name}"
    return name


TURNS = (
    "id",
    "messages",
    "conversations",
    "system",
    *FIELDS,
)  # of a prompt's row; all else is kept


def _task(found: Conversation, name: str, place: int, encoder: Encoder) -> Task:
    turns = asked_turns(found)
    if found.tools or any(isinstance(message, OnlyRead) for message in turns[0]):
        encoder = encoder_for(encoder, turns[0], found.tools, found.row)
    metadata = {k: v for k, v in found.row.items() if k not in TURNS}
    try:
        json.dumps(metadata)
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadRow(
            f"its other fields cannot be written as JSON ({exc}). "
            "Take them out, or set data.on_error=skip",
            "not JSON",
        ) from exc
    return Task(
        id=name,
        where=found.where,
        place=place,
        turns=tuple(turns),
        metadata=metadata,
        length=len(encoder.prompt(turns[0])),
        tools=found.tools,
    )


class OtherOrigin(DataError):
    """A file holds answers of another model or sampling."""


def origin_of(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what every row says about where its answers come from."""
    options = template_options(run.data)
    if CLOCK not in chat_template(tokenizer):
        del options[CLOCK]
    target = run.target
    name = Path(target.path).resolve().name if Path(target.path).is_dir() else target.path
    sampling = {
        **run.regenerate.model_dump(exclude={"prompts", "batch_size"}),
        "chat_template_kwargs": options,
        "dtype": target.dtype,
    }
    model = f"{name}@{target.revision}" if target.revision else name
    # as it reads back from the file
    found: dict[str, Any] = json.loads(
        json.dumps({"model": model, "sampling": sampling}, default=str)
    )
    return {**found, ORIGIN: Fingerprint.of(tokenizer, _target(run)).as_json()}


def _target(run: RunConfig) -> str | None:
    """Return the target's fingerprint; None where only a server may have the weights."""
    if not Path(run.target.path).is_dir() and run.target.engine != IN_PROCESS:
        return None
    with suppress(CaptureError):  # weights of another format, or none: those who need them say so
        return target_fingerprint(load_target_info(run.target))
    return None


def _ids(journal: Journal, origin: Mapping[str, Any], max_length: int = 0) -> set[str]:
    """Return the ids in a file; OtherOrigin where a row has another one.

    A prompt that was too long for less than `max_length` is left out: it may fit now.
    """
    ids = set()
    for row in journal.rows():
        for key, value in origin.items():
            found = row.get(key)
            fits = Fingerprint(**value).differs(found) is None if key == ORIGIN else found == value
            if not fits:
                if found is None:
                    raise OtherOrigin(
                        f"{str(journal.path)!r} has rows without {key!r}, which regenerate did not "
                        "write. Try: -o OTHER.jsonl"
                    )
                if isinstance(found, Mapping):  # what is alike says nothing
                    names = [n for n in {**found, **value} if found.get(n) != value.get(n)]
                    found, value = ({n: one.get(n) for n in names} for one in (found, value))
                raise OtherOrigin(
                    f"{str(journal.path)!r} was written with {key} {found!r}, this run has "
                    f"{value!r}. Set it back, or try: -o OTHER.jsonl"
                )
        before = row.get("max_length", max_length)
        if row.get("reason") == TOO_LONG and isinstance(before, int) and before < max_length:
            continue
        ids.add(str(row["id"]))
    return ids
