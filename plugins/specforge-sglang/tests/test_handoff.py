"""What arrives in files is read once and removed; what nobody waits for is thrown away."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.handoff import FileHandoff
from specforge_sglang.receiver import HttpHandoff
from specforge_sglang_capture import spool
from specforge_sglang_capture.sender import _write

from specforge_core.errors import ConfigError


def names(reader: FileHandoff) -> list[str]:
    return sorted(path.name for path in reader.path.iterdir() if path.name != "lock")


def send(reader: FileHandoff, name: str, content: bytes) -> None:
    part = reader.path / f".{name}.part"
    spool.claim(reader.path, part, len(content))
    _write(part, [memoryview(content)])
    part.rename(reader.path / name)


def test_a_file_is_taken_once(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    send(reader, "a", b"12345678")
    array = reader.take("a", 1)
    assert reader.take("a", 0) is None
    assert bytes(array) == b"12345678"
    reader.close()
    assert bytes(array) == b"12345678"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_again_once_nothing_shares_its_memory(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    send(reader, "a", b"12345678")
    tensor = torch.frombuffer(reader.take("a", 1), dtype=torch.uint8)[2:4]
    send(reader, "b", b"abcdefgh")  # the tensor still lives
    second = reader.take("b", 1)
    assert tensor.tolist() == [ord("3"), ord("4")]
    assert len(names(reader)) == 2
    (inode,) = (int(n.split("-")[1]) for n in names(reader) if n != f".held-{_inode(second)}")
    del tensor
    send(reader, "c", b"short")
    third = reader.take("c", 1)
    assert _inode(third) == inode
    assert bytes(third) == b"short678"
    assert len(names(reader)) == 2
    assert bytes(second) == b"abcdefgh"
    reader.close()


def _inode(array: Any) -> int:
    """Return the inode behind a mapped array, as the kernel tells it."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        start, end = (int(x, 16) for x in fields[0].split("-"))
        if start <= address < end:
            return int(fields[4])
    raise AssertionError("not mapped")


def test_the_smallest_free_file_that_is_long_enough_is_used(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    held = []
    for name, length in (("a", 100), ("b", 30), ("c", 60)):
        send(reader, name, bytes(length))
        held.append(reader.take(name, 1))
    wanted = [_inode(array) for array in held]
    held.clear()
    for name, length, expected in (("d", 50, 2), ("e", 50, 0), ("f", 90, 1)):  # the last one grows
        send(reader, name, b"x" * length)
        held.append(reader.take(name, 1))
        assert _inode(held[-1]) == wanted[expected]
        assert bytes(held[-1][:length]) == b"x" * length
    reader.close()


def test_no_more_is_kept_than_allowed(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path, keep=10)
    send(reader, "a", b"12345678")
    send(reader, "b", b"12345678")
    first, second = reader.take("a", 1), reader.take("b", 1)
    del first
    assert len(names(reader)) == 1  # .held of the second
    del second
    assert [name[:7] for name in names(reader)] == ["free-8-"]
    assert reader.free_bytes() > 8
    reader.close()


def test_what_comes_too_late_can_be_written_over(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    reader.forget("early")
    send(reader, "late", b"x")
    reader.forget("late")
    assert [name[:7] for name in names(reader)] == ["free-1-"]
    send(reader, "early", b"y")
    reader.expect("next")
    assert [name[:7] for name in names(reader)] == ["free-1-"]
    reader.close()


def test_closing_deletes_the_directory_under_the_hands_of_writers(tmp_path: Path) -> None:
    for _ in range(20):
        reader = FileHandoff(tmp_path)
        stop = threading.Event()

        def write(writer: int, reader: FileHandoff, stop: threading.Event) -> None:
            for number in itertools.count():
                try:
                    send(reader, f"{writer}-{number}", b"x")
                except OSError:
                    return  # the directory is gone
                if stop.is_set():
                    return

        threads = [threading.Thread(target=write, args=(i, reader, stop)) for i in range(2)]
        for thread in threads:
            thread.start()
        while reader.take("0-3", 0.01) is None:
            pass
        reader.close()
        stop.set()
        for thread in threads:
            thread.join()
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: No such file.*target\.options\.directory="):
        FileHandoff(tmp_path / "absent")


def test_both_ways_have_the_same_interface(tmp_path: Path) -> None:
    files, receiver = FileHandoff(tmp_path), HttpHandoff()
    for handoff, way in ((files, "files"), (receiver, "http")):
        either: Any = handoff
        assert either.way == way
        either.expect("never", 10)
        assert either.take("never", 0.01) is None
        either.forget("never")
    files.close()
    receiver.close()
