"""Directories of dead readers are found and deleted, those of living ones never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from specforge_sglang_capture import spool

READER = """
import sys
from pathlib import Path
import pytest
from specforge_sglang_capture import spool
path, _ = spool.make(Path(sys.argv[1]))
(path / "frame").write_bytes(b"x" * 100)
print(path, flush=True)
sys.stdin.read()
"""


def test_the_directory_of_a_killed_reader_is_swept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True) as reader:
        assert reader.stdout is not None
        path = Path(reader.stdout.readline().strip())
        assert spool.has_reader(path)
        assert spool.sweep(tmp_path) == []
        reader.kill()
    assert not spool.has_reader(path)
    assert spool.sweep(tmp_path) == [path]
    assert not path.exists()


def test_ones_own_directory_is_kept(tmp_path: Path) -> None:
    path, lock = spool.make(tmp_path)
    assert path.parent == tmp_path
    assert path.name.startswith(f"specforge-{os.getpid()}-")
    assert spool.has_reader(path)
    assert spool.sweep(tmp_path) == []
    os.close(lock)
    assert spool.sweep(tmp_path) == [path]


@pytest.mark.parametrize("name", ["specforge-notes", "specforge-1-abcd", "specforge-12-a.closed"])
@pytest.mark.parametrize(
    "lock", [None, b"", b"mine", spool.MARK + b"and more", "directory", "pipe"]
)
def test_what_is_not_ours_is_kept(tmp_path: Path, name: str, lock: bytes | str | None) -> None:
    """A folder of a like name, whatever it calls its files."""
    path = tmp_path / name
    path.mkdir()
    if lock == "directory":
        (path / spool.LOCK).mkdir()
    elif lock == "pipe":
        os.mkfifo(path / spool.LOCK)
    elif isinstance(lock, bytes):
        (path / spool.LOCK).write_bytes(lock)
    (path / "work").write_text("of a month")
    assert spool.sweep(tmp_path) == []
    assert not spool.has_reader(path)
    assert (path / "work").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    made, lock = spool.make(elsewhere)
    os.close(lock)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / made.name).symlink_to(made)
    assert spool.sweep(tmp_path / "root") == []
    assert made.exists()


def test_another_user_s_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold links, and a server writes where it finds a reader."""
    path, lock = spool.make(tmp_path)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert not spool.has_reader(path)
    os.close(lock)
    assert spool.sweep(tmp_path) == []


def test_what_a_reader_left_while_it_closed_is_swept(tmp_path: Path) -> None:
    path, lock = spool.make(tmp_path)
    os.close(lock)
    closed = path.rename(path.with_name(f"{path.name}.closed"))
    assert spool.sweep(tmp_path) == [closed]
