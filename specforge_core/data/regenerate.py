"""Answers written by the target itself, so that a draft learns to predict that target."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..devices import pick_device
from ..errors import DataError
from ..progress import track
from ..strategy import Strategy
from ..target.tokenizer import chat_template, load_tokenizer
from .chat import encode_prompt
from .journal import Journal
from .respond import Answerer, Task
from .sources import Conversation, Message, Rows, nothing_left, scan


@dataclass(frozen=True, slots=True)
class RegenerateReport:
    """What one call did."""

    output: Path
    num_prompts: int
    num_written: int  # conversations, by this call
    num_before: int  # conversations and dropped prompts found on resuming
    dropped: Mapping[str, int]  # reason -> prompts, by this call
    num_skipped: int  # bad lines, with data.on_error=skip
    num_tokens: int  # in the answers
    seconds: float

    def __str__(self) -> str:
        dropped = "".join(f", {count} dropped ({why})" for why, count in self.dropped.items())
        before = f", {self.num_before} were there before" if self.num_before else ""
        skipped = f", {self.num_skipped} bad lines skipped" if self.num_skipped else ""
        rate = self.num_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.output}: {self.num_written} of {self.num_prompts} prompts answered"
            f"{dropped}{before}{skipped}; {self.num_tokens:,} tokens, {rate:.1f} tokens/s"
        )


def regenerate(run: RunConfig, strategy: Strategy, output: Path) -> RegenerateReport:
    """Answer the user turns of `regenerate.prompts` and append the conversations to `output`.

    A row is {"id", "messages", the prompt row's other fields, "model", "sampling"}.
    Calling it again goes on where it stopped, and draws as one run would have; prompts
    whose first answer was not kept are remembered in `output`.dropped.  Raises DataError
    for bad prompts, and for an output of another model or sampling, and what the engine
    raises; what was written stays.
    """
    start = time.perf_counter()
    tokenizer = load_tokenizer(run.target)
    tasks, num_skipped = read_tasks(run, tokenizer, strategy.conversations)
    origin = _origin(run)
    told = Counter[str]()
    written = num_tokens = 0
    with (
        Journal(output) as answers,
        Journal(output.with_name(output.name + ".dropped")) as refused,
        track("answering prompts", len(tasks)) as progress,
        ExitStack() as stack,
    ):
        done = _ids(answers, origin)
        if done:
            done |= _ids(refused, origin)
        else:
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
                    row = {"id": task.id, "messages": chat.messages, **task.metadata, **origin}
                    answers.append([row])
                    written += 1
                else:
                    refused.append([{"id": task.id, "reason": chat.dropped, **origin}])
                    told[str(chat.dropped)] += 1
                num_tokens = answerer.num_tokens
                progress.advance(note=f"{num_tokens / (answerer.seconds or 1):.1f} tokens/s")
    seconds = time.perf_counter() - start
    return RegenerateReport(
        output, len(tasks), written, before, told, num_skipped, num_tokens, seconds
    )


def read_tasks(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, source_rows: Rows
) -> tuple[list[Task], int]:
    """Read all prompts, and count the bad lines skipped."""
    chat_template(tokenizer)
    tasks: dict[str, Task] = {}
    skipped = 0
    first_bad: DataError | None = None
    files = run.regenerate.prompts
    if not files:
        raise DataError("regenerate.prompts names no file. Try: regenerate.prompts=[PROMPTS.jsonl]")
    for found in scan(map(str, files), run.data, source_rows, need_answer=False):
        try:
            task = _task(found, run, tokenizer, len(tasks))
        except DataError as exc:
            if run.data.on_error == "raise":
                raise
            skipped, first_bad = skipped + 1, first_bad or exc
            continue
        if task.id in tasks:
            raise DataError(
                f"{task.where} has the id {task.id!r} of {tasks[task.id].where}; ids tell what is "
                "done. Give every prompt its own id"
            )
        tasks[task.id] = task
        if len(tasks) == run.data.limit:
            break
    if not tasks:
        raise nothing_left(map(str, files), first_bad)
    return list(tasks.values()), skipped


def _task(
    found: Conversation | DataError, run: RunConfig, tokenizer: PreTrainedTokenizerBase, place: int
) -> Task:
    if isinstance(found, DataError):
        raise found
    turns: list[tuple[Message, ...]] = []
    asked: list[Message] = []
    for message in found.messages:
        if message["role"] == "tool":
            raise DataError(
                f"{found.where}: a tool's answer cannot be regenerated. "
                "Take the line out, or set data.on_error=skip"
            )
        if message["role"] != "assistant":  # the target writes its own
            asked.append(message)
        if message["role"] == "user":
            turns.append(tuple(asked))
            asked = []
    metadata = {k: v for k, v in found.row.items() if k not in ("id", "messages", "conversations")}
    try:
        length = len(encode_prompt(tokenizer, turns[0], run.data.chat_template_kwargs))
    except DataError as exc:
        raise DataError(f"{found.where}: {exc}") from exc
    return Task(
        id=str(found.row.get("id", found.where)),
        where=found.where,
        place=place,
        turns=tuple(turns),
        metadata=metadata,
        length=length,
    )


def _origin(run: RunConfig) -> dict[str, Any]:
    """Return what every row says about where its answers come from."""
    target = run.target
    name = Path(target.path).resolve().name if Path(target.path).is_dir() else target.path
    sampling = {
        **run.regenerate.model_dump(exclude={"prompts", "batch_size"}),
        "chat_template_kwargs": run.data.chat_template_kwargs,
        "dtype": target.dtype,
    }
    model = f"{name}@{target.revision}" if target.revision else name
    # as it reads back from the file
    found: dict[str, Any] = json.loads(
        json.dumps({"model": model, "sampling": sampling}, default=str)
    )
    return found


def _ids(journal: Journal, origin: Mapping[str, Any]) -> set[str]:
    """Return the ids in a file; DataError where a row has another origin."""
    ids = set()
    for row in journal.rows():
        for key, value in origin.items():
            if row.get(key) != value:
                raise DataError(
                    f"{str(journal.path)!r} was written with {key} {row.get(key)!r}, this run has "
                    f"{value!r}. Set it back, or try: -o OTHER.jsonl"
                )
        ids.add(str(row["id"]))
    return ids
