"""A run whose data grows: prompts are answered while it trains, for the epochs that follow."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import stop
from ..batches.loader import Micro, OnlineSource
from ..checksums import file_checksum
from ..config import RunConfig
from ..data.prompts import PromptSet
from ..data.promptset import Joined, Spool, Told
from ..data.regenerate import read_tasks
from ..data.shares import Range, Shares, file_of, read_share
from ..data.split import training_side
from ..data.tokencache import in_memory
from ..data.tokenrows import Fingerprint, token_rows
from ..data.usable import left_out
from ..documents import check_regular
from ..drafts.state import Grown
from ..draws import later_seed
from ..errors import CheckpointError, DataError, RunError
from ..process import describe
from ..strategy import Strategy
from ..target.asked import max_positions
from ..target.tokenizer import load_tokenizer
from .dist import World
from .feed import Feed
from .forward import Forward

FOLDER = "regenerated"  # in output_dir
ROUND_SECONDS = 60.0  # after which all ranks hear that answers are still waited for
POLL_SECONDS = 0.2  # between two looks whether a stop is asked for
CLOSE_SECONDS = 1.0  # that what still answers has to notice that it is over


@dataclass(slots=True)
class Growth:
    """The epochs of `train.regenerate_every`: each has what was answered before it began.

    Which rows an epoch has, in which order, hangs on the steps done and the files named in the
    checkpoint alone.  So the target answers beside the training, and an epoch begins only when
    everything that was asked for is there.
    """

    run: RunConfig
    world: World
    feed: Feed
    source: OnlineSource  # of the run's own data
    prompts: Joined  # of this epoch
    names: list[str]  # of the prompts that can be answered
    origin: Fingerprint
    shares: Shares | None  # on the first rank
    epoch: int = 0
    begin: int = 0  # the position at which it began
    files: dict[str, str] = field(default_factory=dict)  # whose rows it has: name -> checksum
    asked: list[Range] = field(default_factory=list)  # of the next epoch
    taken: int = 0  # prompts
    asked_at: int = 0  # the last step after which a share was asked for
    late: bool = False  # answers were waited for until `train.max_minutes` was over

    @classmethod
    def open(cls, run: RunConfig, strategy: Strategy, world: World, feed: Feed) -> Growth | None:
        """Return what `train.regenerate_every` asks for, if it does.

        Raises, on every rank, what is wrong with `regenerate.prompts`.
        """
        if run.train.regenerate_every is None:
            return None
        source, engine, lock = feed.source, feed.engine, feed.lock
        assert isinstance(source, OnlineSource)
        assert isinstance(source.prompts, PromptSet)
        assert engine is not None
        assert lock is not None
        tokenizer = load_tokenizer(run.target)
        side = training_side(run.data, strategy.conversations)  # what is held out stays so
        tasks, _ = read_tasks(run, tokenizer, strategy.conversations, side)
        shares = None
        if world.main:
            folder = run.output_dir / FOLDER
            shares = Shares(run, tokenizer, engine, lock, tasks, folder)
        return cls(
            run=run,
            world=world,
            feed=feed,
            source=source,
            prompts=Joined(source.prompts),
            names=[task.id for task in tasks],
            origin=Fingerprint.of(tokenizer, feed.identity.target_fingerprint),
            shares=shares,
        )

    @property
    def end(self) -> int:
        """The position at which this epoch ends."""
        return self.begin + len(self.prompts)

    def due(self, step: int, position: int) -> bool:
        """Say whether there is something to do after `step`."""
        return position >= self.end or self._asks(step)

    def _asks(self, step: int) -> bool:
        every = self.run.train.regenerate_every
        return every is not None and step % every == 0 and step > self.asked_at

    def after(self, step: int, position: int, until: float) -> bool | None:
        """Do what is due after `step`, once, however often it is called; on all ranks at once.

        Returns whether another epoch began; None where a stop is asked for before it can, or the
        first rank's clock is at `until`: then `late` is set.
        """
        if self._asks(step):
            self.asked_at = step
            last = min(self.taken + self.run.train.regenerate_prompts, len(self.names))
            self._check()
            if last > self.taken:
                self._ask((self.taken, last))
                self.taken = last
        if position < self.end:
            return False
        if not self._answered(until):
            return None
        added = [self._add(file_of(share)) for share in self.asked]
        self.epoch, self.begin, self.asked = self.epoch + 1, position, []
        new = f", {sum(added)} of them new" if added else ""
        self.world.say(
            f"epoch {self.epoch} begins after step {step}: {len(self.prompts)} rows{new}; "
            f"{len(self.names) - self.taken} prompts are left to be answered"
        )
        return True

    def micro_batches(self, forward: Forward, position: int) -> Iterator[Micro]:
        """Yield this rank's micro-batches from a position of this epoch on; none of the next."""
        count, begin = len(self.prompts), self.begin
        own = self.source.share
        ranks = replace(own, seed=later_seed(self.run.train.seed, self.epoch), first=None)
        source = replace(self.source, prompts=self.prompts, share=ranks)
        batches = replace(forward.batches(self.feed.spec, count), share=ranks)
        for micro in batches.micro_batches(source, position - begin):
            yield replace(micro, position=begin + micro.position)

    def state(self) -> Grown:
        """Return what a checkpoint has to know."""
        return Grown(
            epoch=self.epoch,
            begin=self.begin,
            files=dict(self.files),
            taken=self.taken,
            asked=list(self.asked),
            asked_at=self.asked_at,
            prompts=self._told(self.taken),
        )

    def _told(self, count: int) -> str:
        """Return what tells the first prompts from others."""
        return hashlib.sha256("\n".join(self.names[:count]).encode()).hexdigest()[:32]

    def resume(self, state: Grown) -> None:
        """Go on from a checkpoint; on all ranks at once.

        Raises CheckpointError where a file of answers, or a prompt that is answered, is another.
        """
        if state.prompts != self._told(state.taken):
            raise CheckpointError(
                f"the first {state.taken} prompts of regenerate.prompts, which are answered or "
                "about to be, are others than when the checkpoint was saved: some would be "
                "answered twice and some not at all. Name the same files, with the same "
                "data.validation; others may follow behind them"
            )
        self.epoch, self.begin, self.taken = state.epoch, state.begin, state.taken
        self.asked_at = state.asked_at
        for name, checksum in state.files.items():
            self._add(name, checksum)
        for share in state.asked:
            self._ask(share)

    def close(self) -> None:
        """Give up what is still being answered; a second call has nothing to wait for."""
        shares, self.shares = self.shares, None
        if shares is not None:
            shares.close(CLOSE_SECONDS)

    def _ask(self, share: Range) -> None:
        self.asked.append(share)
        if self.shares is not None:
            self.shares.ask(share)

    def _answered(self, until: float) -> bool:
        """Wait for what was asked for; False where a stop is asked for or time is up first."""
        while True:
            there = self._check(min(ROUND_SECONDS, max(0.0, until - time.monotonic())))
            ends = stop.asked() is not None, time.monotonic() >= until
            there, (stopped, late) = self.world.from_first((there, ends))
            if there or stopped or late:
                self.late = late and not there and not stopped
                return there

    def _check(self, seconds: float = 0.0) -> bool:
        """Wait so long, or until a stop is asked for; say, on the first rank, if all is there.

        Raises RunError, on every rank, where the target does not answer.
        """
        there, failure, until = False, "", time.monotonic() + seconds
        try:
            while self.shares is not None and not there:
                there = self.shares.wait(min(POLL_SECONDS, seconds))
                if stop.asked() is not None or time.monotonic() >= until:
                    break
        except Exception as exc:
            failure = describe(exc)[0]
        if failure := self.world.from_first(failure):
            raise RunError(
                f"train.regenerate_every: the answers did not come: {failure.rstrip('.')}. "
                "Start the same command again to go on from the last checkpoint"
            )
        return there

    def _add(self, name: str, checksum: str | None = None) -> int:
        """Put a file's rows behind those of the epoch; return how many there are.

        They are read by the first rank.  Raises, on all, CheckpointError for another file than
        the checksum is of.
        """
        found: tuple[str, PromptSet | None] | str = ""
        if self.world.main:
            try:
                found = self._read(self.run.output_dir / FOLDER / name, checksum)
            except CheckpointError as exc:
                found = str(exc)
        found = self.world.from_first(found)
        if isinstance(found, str):
            raise CheckpointError(found)
        self.files[name], rows = found
        if rows is not None:
            self.prompts.add(rows)
        return 0 if rows is None else len(rows)

    def _read(self, path: Path, checksum: str | None) -> tuple[str, PromptSet | None]:
        """Return a file's checksum and its rows, as if it stood in `data.train`."""
        data, vocab = self.run.data, self.feed.target.vocab_size
        limit = min(data.max_length, max_positions(self.feed.target) or data.max_length)
        too_long = data.model_copy(
            update={"too_long": "truncate" if data.too_long == "raise" else data.too_long}
        )
        try:
            check_regular(path)
            there = file_checksum(path)
            if checksum not in (None, there):
                raise ValueError("it is not as it was when the checkpoint was saved")
            made = [one for row in read_share(path) for one in token_rows(row, self.origin, limit)]
        except (OSError, ValueError, LookupError, TypeError, DataError, RecursionError) as exc:
            raise CheckpointError(
                f"{path}, whose rows are trained on, cannot be read: {exc}. Restore it from a "
                "copy, or use another output_dir"
            ) from exc
        rows = [one for one in made if left_out(one, too_long, limit, str(path)) is None]
        rows = [one for one in rows if max(one.input_ids) < vocab]

        def fill(spool: Spool) -> Told:
            for row in rows:
                spool.add(row)
            return Told()

        return there, in_memory(fill) if rows else None
