"""One run at a time in an output directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import pytest

from specforge_core import files, stop
from specforge_core.claim import LOCK, claim, running
from specforge_core.errors import ConfigError

HOLD = """
import sys, time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from specforge_core.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with (
        pytest.raises(
            ConfigError,
            match=rf"\(process {first.pid}\) is training in '{tmp_path}'. Wait for it, end it "
            rf"with `kill {first.pid}`, or try: output_dir=DIR",
        ),
        claim(tmp_path),
    ):
        pass
    first.kill()
    first.communicate()
    with claim(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with claim(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path):
        pass
    assert tmp_path.is_dir()
    with claim(tmp_path):
        (tmp_path / "metrics.jsonl").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_ends_and_leaves_nothing_takes_no_other_s_lock_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It removes its file, and its directory, before or after the other has opened the file."""
    run, opened = tmp_path / "run", list[BinaryIO | None]()

    def open_own(path: Path) -> BinaryIO:
        if opened:
            return files.open_own(path)
        early = files.open_own(path) if when == "after" else None
        opened.append(early)
        first.__exit__(None, None, None)
        return early or files.open_own(path)

    first = claim(run)
    first.__enter__()
    monkeypatch.setattr("specforge_core.claim.open_own", open_own)
    with claim(run):
        assert running(run)  # no third one begins
        assert (run / ".lock").read_text() == str(os.getpid())
    assert opened
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_which_another_run_begins_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, run, second = Path.unlink, tmp_path / "run", ExitStack()

    def then_begin(self: Path) -> None:
        monkeypatch.undo()
        unlink(self)
        second.enter_context(claim(run))

    with claim(run):
        monkeypatch.setattr(Path, "unlink", then_begin)
    with second:
        assert running(run)
    assert list(run.iterdir()) == []


def test_a_directory_that_another_run_takes_along_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this one looks into it."""
    (run := tmp_path / "run").mkdir()
    iterdir = Path.iterdir

    def ended(self: Path) -> Iterator[Path]:
        if not (self / LOCK).exists():
            self.rmdir()
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", ended)
    with claim(run):
        assert running(run)


def test_a_file_system_that_numbers_a_file_in_several_ways_is_borne(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.claim.is_at", lambda number, path: False)
    with claim(tmp_path / "run"):
        assert running(tmp_path / "run")


def test_a_command_that_was_asked_to_end_begins_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "_state", stop._State(signum=signal.SIGTERM))
    with pytest.raises(stop.Interrupted), claim(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(ConfigError, match=r"\.lock cannot be written: "), claim(tmp_path):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ConfigError,
            match=r"cannot be written: Not a directory\. Try: output_dir=DIR",
        ),
        claim(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step-00000100/model.pt"])
def test_what_another_program_keeps_where_a_run_does_is_not_replaced(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"step": 9, "loss": 1}\n')
    message = r"is of no run that can go on.*Move it away, or try: output_dir=DIR"
    with pytest.raises(ConfigError, match=message), claim(tmp_path):
        pass
    assert path.read_text() == '{"step": 9, "loss": 1}\n'
    assert not (tmp_path / ".lock").exists()


def test_files_of_others_are_told_of_until_a_run_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c", "d", "metrics.jsonl"):  # which is empty
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    for _ in range(2):
        with claim(tmp_path):
            pass
    told = capsys.readouterr().err
    assert (
        told
        == f"{tmp_path} is not empty (a, b, c and 3 more): what the run writes comes beside that\n"
    )


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)  # its state.json is gone
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / ".lock").touch()
    with claim(tmp_path):  # killed before its first checkpoint
        pass
    (tmp_path / "latest").symlink_to("checkpoints/step-00000003")
    message = r"latest leads to checkpoints/step-00000003, and no checkpoint is there.*output_dir="
    with pytest.raises(ConfigError, match=message), claim(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_files_beside_the_lock_of_another_command_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".lock", "manifest.json"):
        (tmp_path / name).touch()
    with claim(tmp_path):
        pass
    assert "is not empty (manifest.json): what the run writes" in capsys.readouterr().err


def test_a_run_that_was_copied_without_its_lock_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000003/state.json").touch()
    (tmp_path / "metrics.jsonl").write_text("{}")
    with claim(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_an_output_directory_that_cannot_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", denied)
    message = r"lock cannot be written: Permission denied\. Try: output_dir=DIR"
    with pytest.raises(ConfigError, match=message), claim(tmp_path):
        pass


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "checkpoints"])
@pytest.mark.parametrize("kind", ["pipe", "device", "other"])
def test_what_has_the_name_of_a_run_s_own_is_refused_at_once(
    tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/zero")
    elif name == "checkpoints":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    what = "folder" if name == "checkpoints" else "file"
    message = rf"{name} is no {what}, and a run keeps one there\. Move it away, or try: output_dir"
    with pytest.raises(ConfigError, match=message), claim(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
