"""The prompts of a run: its conversations, tokenized once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import transformers
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig, RunConfig
from ..cpu import available_cores
from ..errors import DataError
from ..progress import Meter, tell, track
from ..strategy import Strategy
from ..target.asked import max_positions
from ..target.tokenizer import (
    chat_template,
    template_fingerprint,
    template_options,
)
from ..types import TargetInfo
from .chat import Encoder
from .ends import end_tokens
from .files import to_train_on
from .promptset import PromptSet as PromptSet, Spool, Told
from .rows import RowMaker
from .scatter import GROUP, can_scatter, scattered
from .sources import Rows, Skipped, conversations, mixed, nothing_left
from .split import Side, one_sided, training_side, validation_side
from .stream import Stream
from .tokencache import in_memory, kept, key_of, on_disk
from .tokenrows import Fingerprint
from .usable import check_ids, left_out, nothing_supervised
from .workers import make_rows

SMALL = 4 << 20  # bytes of data that are tokenized as soon as they are looked for


def run_prompts(
    run: RunConfig,
    strategy: Strategy,
    target: TargetInfo,
    tokenizer: PreTrainedTokenizerBase,
    origin: Fingerprint | None = None,
    *,
    validation: bool = False,
) -> Asked:
    """Open a run's conversations, as `open_prompts` does for its target.

    `origin` is None where no weight of the target is to be read.  With `validation` those that are
    held out, without it those that are trained on.
    """
    data = run.data
    rows: Rows = strategy.conversations
    if validation:
        data, side = validation_side(data)
    else:
        side = training_side(data, rows)
        _tell_unread(data, tokenizer)
    if not validation or side is not None:  # a part of what would be trained on
        rows = to_train_on(rows, "data.train")
    return open_prompts(
        data,
        tokenizer,
        target.vocab_size,
        rows,
        side=side,
        positions=max_positions(target),
        ends=end_tokens(target, tokenizer, template_options(run.data)),
        origin=origin,
    )


def _tell_unread(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell of arguments that the chat template has no word of: misspelled, or of another target."""
    template = str(tokenizer.chat_template)
    given = data.chat_template_kwargs
    unread = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unread:
        tell(
            f"note: the target's chat template does not read {', '.join(map(repr, unread))} of "
            "data.chat_template_kwargs: rows are the same without"
        )


def open_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    source_rows: Rows,
    *,
    side: Side | None = None,
    positions: int | None = None,
    ends: frozenset[int] = frozenset(),
    origin: Fingerprint | None = None,
) -> Asked:
    """Open `data.train`, all sources of it; nothing is tokenized yet.

    Of a `side` only its conversations.  `positions` are the tokens that the target takes, `ends`
    those that end its answers.  Tokens that `regenerate` wrote must be of `origin`; without it of
    the tokenizer.  Raises DataError.
    """
    if not data.train:
        raise DataError("data.train names no file. Try: data.train=[FILE.jsonl]")
    chat_template(tokenizer)  # a missing template is no fault of the first line
    limit = min(data.max_length, positions or data.max_length)
    # all of them before any work: a misspelled last one should not cost an hour
    opened = [(source, source_rows(source, data)) for source in data.train]
    options = template_options(data)
    origin = origin or Fingerprint.of(tokenizer, None)
    fill = Filler(
        data=data,
        opened=opened,
        make=RowMaker(Encoder(tokenizer, options, limit, ends), origin, data.ignore_fields),
        limit=limit,
        vocab_size=vocab_size,
        side=side,
        mixed=can_scatter(opened, data, SMALL),
    )
    known = [rows for _, rows in opened if isinstance(rows, Known)]
    if data.cache is None or len(known) < len(opened) or sum(r.num_bytes for r in known) < SMALL:
        return Asked(data, fill, None)
    key = [origin.as_json(), template_fingerprint(tokenizer, options)]
    made_by = [tokenizer.backend_tokenizer.to_str(), transformers.__version__]
    choices = data.model_dump(include={"too_long", "on_error", "limit", "mix", "ignore_fields"})
    bounds = [limit, sorted(ends), vocab_size, choices, side and side.key, fill.mixed]
    return Asked(data, fill, key_of([key, made_by, bounds, *(r.fingerprint() for r in known)]))


@dataclass(frozen=True, slots=True)
class Asked:
    """Conversations that are open; rows that are left out are told of by reason.

    Reading them raises DataError for bad data, for rows longer than `data.max_length` or the
    target's positions when `data.too_long` is "raise", and for token ids the target does not have.
    """

    data: DataConfig
    fill: Filler
    key: str | None  # of their tokens in `data.cache`; None: they are not kept

    @property
    def window(self) -> int | None:
        """The samples that are shuffled together in the first epoch; None: all of them."""
        return GROUP if self.fill.mixed else self.data.shuffle_window

    def load(self) -> PromptSet:
        """Return all rows, with progress."""
        if self.data.cache is None or self.key is None:
            found = in_memory(self.fill)
        else:
            found = on_disk(self.data.cache, self.key, self.fill)
        self._tell(found)
        return found

    def stream(self) -> PromptSet | Stream:
        """Return the rows before all of them are tokenized, if they are many and not kept yet."""
        if self.data.cache is None or self.key is None:
            return self.load()
        if (found := kept(self.data.cache, self.key)) is not None:
            self._tell(found)
            return found
        quiet = replace(self.fill, quiet=True)
        return Stream(self.data.cache, self.key, quiet, self._tell)

    def _tell(self, found: PromptSet) -> None:
        if found.skipped:
            skipped = Skipped(self.data.on_error, Counter(found.skipped))
            tell(f"data.train: {skipped}")


@runtime_checkable
class Known(Protocol):
    """Rows of a source that tell what they are of, so that their tokens can be kept."""

    @property
    def num_bytes(self) -> int: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Filler:
    """Tokenizes all sources, with progress."""

    data: DataConfig
    opened: Sequence[tuple[str, Iterable[Mapping[str, Any] | DataError]]]
    make: RowMaker
    limit: int  # tokens of a row
    vocab_size: int
    quiet: bool = False  # beside something else that tells of its progress
    side: Side | None = None
    mixed: bool = False  # rows are read in a mixed order

    def __call__(self, spool: Spool) -> Told:
        """Write all rows.  Raises DataError where there is none."""
        data, limit = self.data, self.limit
        skipped, used, cut = Skipped(data.on_error), Counter[str](), 0
        if self.mixed:
            items = scattered(self.opened, data)
        else:
            items = mixed(conversations(self.opened, data, need_answer=True), data.mix)
        if self.side is not None:
            items = self.side.only(items, data.limit)
        workers = available_cores() if data.workers is None else data.workers
        with (
            self._progress() as progress,
            closing(make_rows(items, self.make, workers)) as made,
        ):
            for found, rows in made:
                if isinstance(found, DataError):
                    skipped.add(found)
                    continue
                if isinstance(rows, DataError):
                    skipped.add(rows)
                    continue
                used[found.source] += 1
                for row in rows:
                    if (reason := left_out(row, data, limit, found.where)) is not None:
                        skipped.counts[reason] += 1
                        continue
                    check_ids(row.input_ids, self.vocab_size, found.where)
                    spool.add(row)
                    cut += row.length > limit
                progress.advance(note=f"{spool.num_tokens:,} tokens")
                if used.total() == data.limit:
                    break
        if not used:
            if self.side is not None and self.side.others:
                raise one_sided(self.side, data)
            raise nothing_left(data.train, skipped.first)
        if not spool.num_tokens:
            raise nothing_supervised(used.total(), skipped, data, limit)
        others, least = 0, None
        if self.side is not None:
            others = self.side.others
            least = self.side.least if self.side.fraction and not others else None
        sources = [used[name] for name in data.train]
        return Told(used.total(), cut, dict(skipped.counts), sources, others, least)

    def _progress(self) -> AbstractContextManager[Meter]:
        if self.quiet:
            return nullcontext(Meter("", None, None))
        return track("reading conversations", self.data.limit)
