from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from specforge_core.capture.cache import ENDING, StateCache
from specforge_core.config import CacheConfig
from specforge_core.errors import ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.runs import load, losses, write_run
from specforge_core.train.run import train
from specforge_core.types import CaptureSpec, Field, Prompt, Sample, TargetCapture

SPEC = CaptureSpec(
    layers=(1,),
    fields={
        "input_ids": Field(shape=(None,), dtype="int64"),
        "hidden": Field(shape=(None, 100), dtype="float32"),
        "one": Field(shape=(), dtype="float32"),
        "two": Field(shape=(2,), dtype="bfloat16"),
    },
)
TOKENS = 10
BYTES = TOKENS * (8 + 400) + 4 + 4 + 16  # of a sample


def prompt(number: int) -> Prompt:
    ids = torch.full((TOKENS,), number)
    return Prompt(index=number, input_ids=ids, loss_mask=torch.ones_like(ids))


def sample(number: int) -> Sample:
    draw = torch.Generator().manual_seed(number)
    return {
        "input_ids": torch.full((TOKENS,), number),
        "hidden": torch.randn(TOKENS, 100, generator=draw),
        "one": torch.tensor(float(number)),
        "two": torch.randn(2, generator=draw).bfloat16(),
    }


def opened(folder: Path, most: int = 10**9, about: Sequence[object] = ("target",)) -> StateCache:
    return StateCache(CacheConfig(dir=folder, max_bytes=most), about, SPEC)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def samples_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.states"), key=lambda path: path.stat().st_mtime_ns)


def found(cache: StateCache, numbers: range) -> list[int]:
    return [number for number in numbers if cache.get(prompt(number)) is not None]


def test_a_sample_is_read_back_as_it_was(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    assert cache.get(prompt(3)) is None
    cache.put(prompt(3), sample(3))
    for other in (cache, opened(tmp_path)):
        back = other.get(prompt(3))
        assert back is not None
        assert back.keys() == SPEC.fields.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in sample(3).items())
    assert (cache.hits, cache.misses) == (1, 1)


def test_what_is_of_other_tokens_another_mask_or_target_is_not_found(tmp_path: Path) -> None:
    opened(tmp_path).put(prompt(3), sample(3))
    assert opened(tmp_path).get(prompt(4)) is None
    masked = Prompt(index=3, input_ids=prompt(3).input_ids, loss_mask=torch.zeros(10).long())
    assert opened(tmp_path).get(masked) is None
    assert opened(tmp_path, about=("another",)).get(prompt(3)) is None
    moved = Prompt(index=9, input_ids=prompt(3).input_ids, loss_mask=prompt(3).loss_mask)
    assert opened(tmp_path).get(moved) is not None  # a prompt's place does not matter


def test_the_oldest_make_room_and_the_quota_holds_after_every_sample(tmp_path: Path) -> None:
    most = 6 * BYTES
    cache = opened(tmp_path, most)
    there: set[Path] = set()
    for number in range(20):
        cache.put(prompt(number), sample(number))
        assert used(tmp_path) <= most
        # a file system's clock may not have moved on since the one before
        for new in set(samples_in(tmp_path)) - there:
            os.utime(new, (number, number))
            there.add(new)
        kept = found(cache, range(20))
        assert kept == list(range(number + 1))[-len(kept) :]
    assert len(kept) >= 3
    smaller = opened(tmp_path, 3 * BYTES)  # another run allows less
    assert used(tmp_path) <= 3 * BYTES
    assert found(smaller, range(20)) in ([19], [18, 19])


def test_what_is_larger_than_the_quota_or_not_finite_is_not_kept(tmp_path: Path) -> None:
    cache = opened(tmp_path, BYTES)
    cache.put(prompt(1), sample(1))
    assert samples_in(tmp_path) == []
    opened(tmp_path).put(prompt(1), {**sample(1), "one": torch.tensor(float("nan"))})
    assert samples_in(tmp_path) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    path.write_bytes(b"short")


def shorter(path: Path, tokens: int = TOKENS - 1) -> None:
    """Leave out bytes, and say what the checksum of the rest is."""
    data = path.read_bytes()[: (TOKENS - 1) * 400]
    path.write_bytes(data + ENDING.pack(tokens, xxhash.xxh3_64_intdigest(data)))


def negative(path: Path) -> None:
    shorter(path, -1)


def endless(path: Path) -> None:
    shorter(path, 2**62)


@pytest.mark.parametrize("damage", [cut, flip, empty, short, shorter, negative, endless])
def test_a_damaged_file_is_not_found_and_makes_place_for_a_new_one(
    tmp_path: Path, damage: Any
) -> None:
    cache = opened(tmp_path)
    cache.put(prompt(3), sample(3))
    damage(samples_in(tmp_path)[0])
    assert cache.get(prompt(3)) is None
    assert samples_in(tmp_path) == []
    cache.put(prompt(3), sample(3))
    assert cache.get(prompt(3)) is not None


def test_a_sample_of_another_layout_is_not_kept(tmp_path: Path) -> None:
    opened(tmp_path).put(prompt(1), {**sample(1), "one": torch.tensor(1.0).double()})
    assert samples_in(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_and_counted(tmp_path: Path) -> None:
    opened(tmp_path).put(prompt(3), sample(3))
    left = tmp_path / f".x.specforge-{'0' * 16}.tmp"
    left.write_bytes(bytes(10 * BYTES))
    (tmp_path / ".usage").write_bytes(b"")
    cache = opened(tmp_path, 3 * BYTES)
    assert not left.exists()
    left.write_bytes(bytes(10 * BYTES))
    for number in range(4, 9):
        cache.put(prompt(number), sample(number))
    assert not left.exists()
    assert used(tmp_path) <= 3 * BYTES


def test_several_writers_share_a_folder_and_its_quota(tmp_path: Path) -> None:
    most, highest, done = 8 * BYTES, [0], threading.Event()

    def write(first: int) -> None:
        cache = opened(tmp_path, most)
        for number in range(first, first + 40):
            cache.put(prompt(number), sample(number))
            cache.get(prompt(number - 2))

    def watch() -> None:
        while not done.is_set():
            sizes = []
            for path in tmp_path.iterdir():
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    break  # no sum of one moment
            else:
                highest[0] = max(highest[0], sum(sizes))

    writers = [threading.Thread(target=write, args=(100 * n,)) for n in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert 3 * BYTES < used(tmp_path) <= most
    # files seen one by one: at most what was there, and one that came meanwhile for each that left
    assert highest[0] <= most + 3 * (BYTES + 2048)
    assert int((tmp_path / ".usage").read_text()) == sum(
        path.stat().st_size for path in samples_in(tmp_path)
    )


def test_a_disk_that_takes_no_more_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "x")

    cache = opened(tmp_path)
    cache.put(prompt(1), sample(1))
    monkeypatch.setattr("specforge_core.capture.cache.replacing", full)
    cache.put(prompt(2), sample(2))
    cache.put(prompt(3), sample(3))
    assert capsys.readouterr().err.count("no more states are kept in capture.cache") == 1
    assert found(cache, range(4)) == [1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the prompts that targets are asked for, as they are."""
    inner, numbers = TransformersEngine.capture, []

    def capture(
        self: TransformersEngine, prompts: Sequence[Prompt], spec: CaptureSpec
    ) -> Iterator[TargetCapture]:
        numbers.extend(prompt.index for prompt in prompts)
        return inner(self, prompts, spec)

    monkeypatch.setattr(TransformersEngine, "capture", capture)
    return numbers


@pytest.mark.slow
def test_a_second_epoch_and_a_second_run_read_what_the_first_captured(
    tmp_path: Path, toy_target: Path, asked: list[int]
) -> None:
    settings = {"batch_size": 2, "epochs": 2, "seed": 3}
    config = write_run(
        tmp_path, toy_target, conversations=8, strategy={"name": "linear"}, train=settings
    )
    on = (f"capture.cache.dir={tmp_path / 'kept'}", "capture.cache.max_bytes=10000000")
    looks = 5  # at the first samples, before training
    train(*load(config))
    assert len(asked) >= looks + 16
    asked.clear()
    train(*load(config, *on, f"output_dir={tmp_path / 'one'}"))
    assert sorted(asked[looks:]) == list(range(8))  # each once
    asked.clear()
    files = samples_in(tmp_path / "kept")
    assert len(files) == 8
    flip(files[0])
    cut(files[1])
    train(*load(config, *on, f"output_dir={tmp_path / 'two'}"))
    assert len(asked) == looks + 2  # the damaged ones
    plain = losses(tmp_path / "run")
    assert losses(tmp_path / "one") == pytest.approx(plain, rel=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(plain, rel=1e-4)


def test_a_folder_that_cannot_be_written_is_said_before_the_target_is_loaded(
    tmp_path: Path, toy_target: Path, asked: list[int]
) -> None:
    config = write_run(tmp_path, toy_target, conversations=8, strategy={"name": "linear"})
    (tmp_path / "file").touch()
    on = (f"capture.cache.dir={tmp_path / 'file'}", "capture.cache.max_bytes=10000000")
    with pytest.raises(ConfigError, match=r"Try: capture\.cache\.dir=DIR"):
        train(*load(config, *on))
    with pytest.raises(ConfigError, match=r"capture\.cache\.max_bytes: .*required"):
        load(config, on[0])
    assert asked == []
