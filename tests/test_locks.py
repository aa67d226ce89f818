"""A lock is one process's, until its file is closed."""

from __future__ import annotations

from pathlib import Path

from specforge_core.locks import hold


def test_a_file_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("a") as first, path.open("a") as second:  # each opening is a holder of its own
        assert hold(first)
        assert not hold(second)
        first.close()
        assert hold(second)
