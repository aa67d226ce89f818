"""Directories of dead readers are found and deleted, those of living ones never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from specforge_sglang_capture import spool

READER = """
import sys
from pathlib import Path
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


def test_what_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / "specforge-notes").mkdir()  # no lock: not a hand-off directory
    (tmp_path / "other").mkdir()
    assert spool.sweep(tmp_path) == []
    assert not spool.has_reader(tmp_path / "specforge-notes")
