"""Sources of samples for tests of what is made of them: stored, growing, online."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch

from specforge_core.batches.collate import pad
from specforge_core.batches.loader import (
    Batches,
    Micro,
    OnlineSource,
    Share,
    Source,
    StoredSource,
)
from specforge_core.data.promptset import PromptSet
from specforge_core.types import (
    CaptureSpec,
    Collate,
    Field,
    Prompt,
    Sample,
    TargetCapture,
    Transform,
)

from ..captured import bare_strategy

CPU = torch.device("cpu")
STRATEGY = bare_strategy()
SPEC = CaptureSpec(layers=(), fields={"input_ids": Field(shape=(None,), dtype="int64")})


class Stored:
    """A reader of samples of ragged length; sample i holds i + 1 times the value i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.count
        return {"input_ids": torch.full((index + 1,), index)}


class Growing(Stored):
    """One more sample at every look, until there are `final`."""

    def __init__(self, final: int) -> None:
        super().__init__(0)
        self.final = final

    def refresh(self) -> bool:
        self.count = min(self.count + 1, self.final)
        return self.count == self.final


def keep(sample: Sample, generator: torch.Generator) -> Sample:
    return sample


def stored(share: Share, count: int = 7) -> StoredSource:
    return StoredSource(Stored(count), share)


PAD: Collate = partial(pad, ragged={"input_ids"})


def batches(
    source: Source,
    share: Share,
    position: int = 0,
    size: int = 2,
    transform: Transform = keep,
    collate: Collate = PAD,
    end: int | None = None,
) -> Iterator[Micro]:
    return Batches(
        strategy=STRATEGY,
        spec=SPEC,
        transform=transform,
        collate=collate,
        share=share,
        batch_size=size,
        device=CPU,
        end=end,
    ).micro_batches(source, position)


ALONE = Share(0, 1, 3)


def values(micro: Micro) -> list[int]:
    return [int(row[0]) for row in micro.batch["input_ids"]]


def seen(micros: Iterator[Micro], count: int) -> list[int]:
    return [value for m in islice(micros, count) for value in values(m)]


class Echo:
    """An engine that remembers which prompts it was asked for together."""

    info = None

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.busy = False

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        assert not self.busy
        self.busy = True
        self.asked.append([p.index for p in prompts])
        for p in reversed(prompts):
            yield TargetCapture(
                index=p.index, input_ids=p.input_ids, loss_mask=p.loss_mask, hidden_states={}
            )
        self.busy = False

    def close(self) -> None: ...


class Ids:
    """Keeps a prompt's tokens, unless its index is to be skipped."""

    spec = SPEC

    def __init__(self, skip: Sequence[int] = ()) -> None:
        self.skip = skip

    def __call__(self, capture: TargetCapture) -> Sample | None:
        return None if capture.index in self.skip else {"input_ids": capture.input_ids}


def online(
    share: Share, engine: Echo | None = None, count: int = 7, skip: Sequence[int] = ()
) -> OnlineSource:
    counts = torch.arange(count)
    ids = counts.repeat_interleave(counts + 1).int()  # prompt i holds i + 1 times the value i
    offsets = torch.cat([torch.zeros(1).long(), (counts + 1).cumsum(0)])
    prompts = PromptSet(ids, torch.ones_like(ids).char(), offsets)
    return OnlineSource(STRATEGY, engine or Echo(), Ids(skip), prompts, share, window=4)  # type: ignore[arg-type]
