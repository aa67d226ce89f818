from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch

from specforge_core.batches.loader import Micro, OnlineSource, Share, StoredSource, micro_batches
from specforge_core.data.order import epoch_order
from specforge_core.defaults import pad
from specforge_core.errors import DataError
from specforge_core.types import CaptureSpec, Prompt, Sample, TargetCapture

CPU = torch.device("cpu")


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


def keep(sample: Sample) -> Sample:
    return sample


def batches(source: StoredSource, position: int = 0, size: int = 2) -> Iterator[Micro]:
    return micro_batches(
        source, keep, pad, batch_size=size, position=position, epoch_length=7, device=CPU
    )


def seen(micros: Iterator[Micro], count: int) -> list[int]:
    return [int(row[0]) for m in islice(micros, count) for row in m.batch["input_ids"]]


def test_the_first_epoch_is_in_stored_order_and_the_next_one_shuffled() -> None:
    order = seen(batches(StoredSource(Stored(7), Share(0, 1, 3))), 7)
    assert order == [*range(7), *epoch_order(7, 3, 1)]


def test_the_ranks_together_see_what_one_process_does() -> None:
    alone = seen(batches(StoredSource(Stored(7), Share(0, 1, 3)), size=3), 6)
    shares = [seen(batches(StoredSource(Stored(7), Share(r, 3, 3)), size=1), 6) for r in range(3)]
    assert [shares[i % 3][i // 3] for i in range(18)] == alone


def test_a_stream_taken_up_again_goes_on_where_it_was() -> None:
    source = StoredSource(Stored(7), Share(0, 1, 0))
    first = list(islice(batches(source), 9))
    again = list(islice(batches(source, position=first[3].position), 5))
    assert all(
        torch.equal(a.batch["input_ids"], b.batch["input_ids"])
        for a, b in zip(first[4:], again, strict=True)
    )


def test_batches_are_padded_and_their_tokens_counted() -> None:
    micro = next(batches(StoredSource(Stored(7), Share(0, 1, 0)), size=3))
    assert micro.batch["input_ids"].tolist() == [[0, 0, 0], [1, 1, 0], [2, 2, 2]]
    assert (micro.num_samples, micro.num_tokens) == (3, 6)


def test_a_dropped_sample_is_replaced_by_the_next_one() -> None:
    def odd(sample: Sample) -> Sample | None:
        return sample if int(sample["input_ids"][0]) % 2 else None

    source = StoredSource(Stored(7), Share(0, 1, 0))
    micros = micro_batches(source, odd, pad, batch_size=3, position=0, epoch_length=7, device=CPU)
    first = next(micros)
    assert first.batch["input_ids"][:, 0].tolist() == [1, 3, 5]
    assert first.position == 6


def test_an_epoch_without_a_sample_to_train_on_is_an_error() -> None:
    source = StoredSource(Stored(7), Share(0, 1, 0))
    micros = micro_batches(
        source, lambda s: None, pad, batch_size=1, position=0, epoch_length=7, device=CPU
    )
    with pytest.raises(DataError, match="none of 7 samples can be trained on"):
        next(micros)


def test_a_growing_capture_is_waited_for_and_gives_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specforge_core.batches.loader.POLL_SECONDS", 0.0)
    grown = seen(batches(StoredSource(Growing(7), Share(0, 1, 3))), 7)
    assert grown == seen(batches(StoredSource(Stored(7), Share(0, 1, 3))), 7)


def test_a_growing_capture_that_ends_empty_is_an_error() -> None:
    with pytest.raises(DataError, match="finished without a sample"):
        next(batches(StoredSource(Growing(0), Share(0, 1, 0))))


class Echo:
    """An engine that remembers which prompts it was asked for together."""

    info = None

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        self.asked.append([p.index for p in prompts])
        for p in reversed(prompts):
            yield TargetCapture(
                index=p.index, input_ids=p.input_ids, loss_mask=p.loss_mask, hidden_states={}
            )

    def close(self) -> None: ...


class Ids:
    spec = CaptureSpec(layers=(), fields={})

    def __call__(self, capture: TargetCapture) -> Sample:
        return {"input_ids": capture.input_ids}


def online(engine: Echo, share: Share) -> OnlineSource:
    prompts = [
        Prompt(index=i, input_ids=torch.full((i + 1,), i), loss_mask=torch.ones(i + 1))
        for i in range(7)
    ]
    return OnlineSource(engine, Ids(), prompts, share, window=4)  # type: ignore[arg-type]


def test_online_samples_come_in_the_order_a_capture_stores_them() -> None:
    found = list(islice(online(Echo(), Share(0, 1, 3)).samples(0), 14))
    first = epoch_order(7, 3, 0)
    second = [first[i] for i in epoch_order(7, 3, 1)]
    assert [int(s["input_ids"][0]) for _, s in found if s is not None] == [*first, *second]


def test_a_resumed_online_run_asks_for_the_same_windows() -> None:
    whole, resumed = Echo(), Echo()
    all_ = list(islice(online(whole, Share(1, 2, 3)).samples(0), 11))
    rest = list(islice(online(resumed, Share(1, 2, 3)).samples(6), 5))
    assert [p for p, _ in rest] == [p for p, _ in all_[6:]] == [7, 8, 9, 10, 11]
    assert resumed.asked == whole.asked[1:]
