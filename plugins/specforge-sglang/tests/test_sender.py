"""Frames are handed over whole, in the background, and only to readers that live."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.handoff import FileHandoff
from specforge_sglang_capture import sender as module, spool
from specforge_sglang_capture.ask import Ask
from specforge_sglang_capture.frame import pack, unpack
from specforge_sglang_capture.sender import Parcel, Sender


def parcel(place: str, name: str, size: int = 10) -> Parcel:
    pieces = pack({"name": name}, torch.arange(4), [torch.full((4, 8), 2.5)])
    return Parcel(Ask(name, "files", place, (0,), "none"), size, lambda: pieces)


def test_a_file_arrives_whole(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    Sender(tmp_path).put(parcel(reader.place, "a"))
    frame = unpack(reader.take("a", 20))
    assert frame.header["name"] == "a"
    assert torch.equal(frame.states[0], torch.full((4, 8), 2.5))
    reader.close()


def test_one_failure_does_not_stop_the_next(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    sender = Sender(tmp_path, threads=1)

    def broken() -> list[memoryview]:
        raise RuntimeError("the copy failed")

    sender.put(Parcel(parcel(reader.place, "a").ask, 5, broken))
    sender.put(parcel("specforge-nobody", "b"))
    sender.put(parcel(reader.place, "c"))
    assert reader.take("c", 20) is not None
    assert reader.take("a", 0) is None
    reader.close()


def test_too_much_on_its_way_holds_back_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 100)
    reader = FileHandoff(tmp_path)
    sender = Sender(tmp_path, threads=1)
    gate = threading.Event()
    first = parcel(reader.place, "a", 100)

    def when_open() -> Any:
        gate.wait()
        return first.pieces()

    sender.put(Parcel(first.ask, 100, when_open))
    second = threading.Thread(target=sender.put, args=(parcel(reader.place, "b", 1),))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    assert not second.is_alive()
    assert reader.take("b", 20) is not None
    reader.close()


def test_a_full_tmpfs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FileHandoff(tmp_path)
    write, full = module._write, threading.Event()
    full.set()

    def out_of_space(path: Path, pieces: Any) -> None:
        write(path, pieces)
        if full.is_set():  # what a full tmpfs does, after part of the file
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", out_of_space)
    Sender(tmp_path).put(parcel(reader.place, "a"))
    assert reader.take("a", 0.3) is None
    full.clear()
    assert reader.take("a", 20) is not None
    assert [p.name[:5] for p in sorted(reader.path.iterdir())] == ["free-", "lock"]
    reader.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_real_full_tmpfs_is_waited_for(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        reader = FileHandoff(small)
        filler = reader.path / "filler"
        filler.write_bytes(bytes(60 * 1024))
        sender = Sender(small)
        sender.put(parcel(reader.place, "a"))
        pieces = pack({"name": "b"}, torch.arange(400), [torch.ones(400, 8)])
        sender.put(Parcel(Ask("b", "files", reader.place, (0,), "none"), 1, lambda: pieces))
        assert reader.take("b", 0.3) is None
        filler.unlink()
        frame = unpack(reader.take("b", 20))
        assert torch.equal(frame.states[0], torch.ones(400, 8))
        del frame
        reader.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_link_in_the_place_of_a_frame_is_not_written_through(tmp_path: Path) -> None:
    reader = FileHandoff(tmp_path)
    (tmp_path / "victim").write_bytes(b"precious")
    (reader.path / ".a.part").symlink_to(tmp_path / "victim")
    sender = Sender(tmp_path, threads=1)
    sender.put(parcel(reader.place, "a"))
    sender.put(parcel(reader.place, "b"))
    assert reader.take("b", 20) is not None
    assert reader.take("a", 0) is None
    assert (tmp_path / "victim").read_bytes() == b"precious"
    reader.close()


def test_nothing_is_written_for_a_reader_that_is_gone(tmp_path: Path) -> None:
    path, lock = spool.make(tmp_path)
    os.close(lock)  # what the kernel does when a reader is killed
    keep = tmp_path / "copy"
    sender = Sender(tmp_path)
    for _ in range(100):  # a sender sweeps as it begins
        if not path.exists():
            break
        time.sleep(0.05)
    assert not path.exists()
    shutil.copytree(tmp_path, keep)
    sender.put(parcel(path.name, "a"))
    time.sleep(0.2)
    assert not path.exists()
