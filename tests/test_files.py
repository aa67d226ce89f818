from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from specforge_core import locks
from specforge_core.errors import DataError
from specforge_core.files import (
    TEMPORARY,
    append,
    inside,
    make_folder,
    prepare_folder,
    publish,
    refusing,
    remove_folder,
    replacing,
    sweep,
    temporary,
    temporary_folder,
    write_file,
)


def test_a_file_is_replaced_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    with replacing(path) as file:
        file.write(b"n")
        assert path.read_bytes() == b"old"
        file.write(b"ew")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def torn(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    with pytest.raises(error):
        torn(path, error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_name_beside_cannot_be_guessed_and_fits(tmp_path: Path) -> None:
    long = tmp_path / ("ü" * 120)  # 240 bytes
    names = {temporary(long) for _ in range(50)}
    assert len(names) == 50
    assert all(TEMPORARY.fullmatch(name.name) for name in names)
    write_file(long, b"x")
    assert long.read_bytes() == b"x"


def test_the_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").resolve())
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    synced.clear()
    write_file(tmp_path / "a" / "b" / "file", b"x")
    assert TEMPORARY.fullmatch(synced[0].name)
    assert synced[1:] == [tmp_path / "a" / "b"]


def test_a_link_at_the_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a.json").symlink_to("victim")
    write_file(tmp_path / "a.json", b"new")
    assert not (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_what_lies_under_a_name_beside_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    for plant in (Path.touch, lambda path: path.symlink_to("victim")):
        beside = temporary(tmp_path / "a.json")
        plant(beside)
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "a.json", b"new")
        assert (tmp_path / "victim").read_bytes() == b"precious"
        beside.unlink(missing_ok=True)


def leave(folder: Path) -> None:
    """Leave a file and a folder, as a process that was killed does."""
    temporary(folder / "file").write_bytes(b"half")
    beside = temporary(folder / "folder")
    beside.mkdir()
    (beside / "part").touch()


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    leave(tmp_path)
    others = [".file.tmp", ".file.specforge-0123.tmp", "file.specforge-0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).touch()
    temporary(tmp_path / "link").symlink_to(".file.tmp")  # goes, and not what it leads to
    with replacing(tmp_path / "held") as file, temporary_folder(tmp_path / "kept") as beside:
        file.write(b"x")
        sweep(tmp_path)
        (beside / "inside").touch()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "held"}
    sweep(tmp_path / "nowhere")


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_swept_before_it_is_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """As when another process sweeps a folder that several write to."""
    hold, swept = locks.hold, list[str]()

    def remove(path: Path, number: int) -> None:
        path.rmdir() if path.is_dir() else path.unlink()
        os.close(number)

    def late(number: int) -> bool:
        if not (found := [path for path in tmp_path.iterdir() if path.name not in ("a", "b")]):
            return hold(number)
        (path,) = found
        if path.name not in swept and len(swept) < 2:
            swept.append(path.name)
            if taken:  # the sweep is in the middle of it
                other = os.open(path, os.O_RDONLY)
                assert hold(other)
                threading.Timer(0.05, remove, (path, other)).start()
            else:
                sweep(tmp_path)
        return hold(number)

    monkeypatch.setattr(locks, "hold", late)
    write_file(tmp_path / "a", b"x")
    with temporary_folder(tmp_path / "b") as beside:
        write_file(beside / "inside", b"x")
        publish(beside, tmp_path / "b")
    assert len(swept) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_that_is_swept_before_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = Path.mkdir, list[Path]()

    def swept(self: Path, **how: Any) -> None:
        mkdir(self, **how)
        made.append(self)
        if TEMPORARY.fullmatch(self.name) and made.count(self) == 1:
            sweep(self.parent)

    monkeypatch.setattr(Path, "mkdir", swept)
    with temporary_folder(tmp_path / "b") as beside:
        assert made == [tmp_path, beside, beside]
        assert beside.is_dir()


def test_another_users_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # as on a kernel or file system that cannot
        monkeypatch.setattr("specforge_core.files._exchange", lambda one, other: False)
    for content in (b"old", b"new"):
        with temporary_folder(tmp_path / "deep" / "out") as beside:
            write_file(beside / "a", content)
            publish(beside, tmp_path / "deep" / "out")
        assert (tmp_path / "deep" / "out" / "a").read_bytes() == content
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    remove_folder(tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def half_a_folder(path: Path) -> None:
    with temporary_folder(path) as beside:
        write_file(beside / "a", b"x")
        write_file(beside / "missing" / "b", b"x")


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="out"):
        half_a_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_added_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("ab", buffering=0) as file:
        append(file, b"one\n", 0)
        append(file, b"torn", 4)
        append(file, b"two\n", 4)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*log'"):
            append(file, b"three\n", 8)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/hosts", "a/b", "a/", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a file in"):
        inside(tmp_path, name)


def test_errors_say_which_file_why_the_room_there_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            DataError,
            match=r"file/a cannot be written: Not a directory\. Do",
        ),
        refusing(DataError, "Do something"),
    ):
        write_file(tmp_path / "file" / "a", b"")
    with (
        pytest.raises(DataError, match=r"/x/y cannot be written: why\. "),
        refusing(DataError, "", Path("/x/y")),
    ):
        raise OSError(5, "why")


def test_a_folder_is_tried_before_the_work(tmp_path: Path) -> None:
    leave(tmp_path)
    prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        prepare_folder(tmp_path / "file" / "eval")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"\([0-9.]+ \w+ free there\)\. Make room there, or"),
        (errno.EDQUOT, r"\([0-9.]+ \w+ free there\)\. Make room there, or"),
        (errno.EACCES, r"Permission denied\. Get the right to write there, or"),
        (errno.EROFS, r"Read-only file system\. Get the right to write there, or"),
        (errno.ENOTDIR, r"Not a directory\. Correct that path, or"),
        (errno.ENOENT, r"No such file or directory\. Correct that path, or"),
        (errno.EFBIG, r"File too large\. Raise the limit on the size of files \(ulimit -f\), or"),
        (errno.EIO, r"Input/output error\. Look what is wrong there, or"),
    ],
)
def test_room_is_asked_for_where_it_helps(tmp_path: Path, number: int, advice: str) -> None:
    with (
        pytest.raises(DataError, match=rf"x cannot be written: .*{advice} try: -o Y"),
        refusing(DataError, "Make room there, or try: -o Y", tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number))
