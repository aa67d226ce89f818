"""A file system without room, under every command: one message, the last good state, no rest."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge_core.capture.job import run_capture
from specforge_core.capture.verify import verify_directory
from specforge_core.data.journal import Journal
from specforge_core.data.shares import Shares, file_of
from specforge_core.drafts.checkpoint import checkpoints
from specforge_core.drafts.export import read_export, write_export
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    RunError,
    SpecForgeError,
)
from specforge_core.evaluate.plot import plot_loss
from specforge_core.evaluate.run import evaluate
from specforge_core.files import TEMPORARY
from specforge_core.new import write_package
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import SECONDS, finish, lines, load
from specforge_core.train.metrics import MetricsFile
from specforge_core.train.run import train
from specforge_core.types import Export

from .runs import linear_run
from .train.growing import GROWS

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

PAGE = 4096
MS_RDONLY, MS_REMOUNT = 1, 32  # linux/mount.h
NO_ROOM = r"cannot be written: No space left on device \([0-9.]+ \w+ free there\)\. "


def mount(path: Path, flags: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    options = b"size=8388608"
    result: int = libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", flags, options)
    return result


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if mount(path) != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield path
    ctypes.CDLL(None).umount2(str(path).encode(), 2)


def fill(disk: Path, pages: int = 0) -> Path:
    """Leave room for some pages only; return the file to remove."""
    found = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(found.f_bavail * found.f_frsize - pages * PAGE))
    return filler


def state(folder: Path) -> dict[str, str]:
    """Return what lies in a folder, locks aside; nothing may be left half-written."""
    files = [path for path in folder.rglob("*") if path.name not in (".lock", "filler")]
    assert not [path for path in files if TEMPORARY.fullmatch(path.name)]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def refused(kind: type[SpecForgeError], what: str, error: SpecForgeError) -> None:
    assert type(error) is kind
    assert what in str(error).split(" cannot be written")[0]
    assert "\n" not in str(error)


def test_a_run_that_cannot_begin_leaves_nothing(
    disk: Path, tmp_path: Path, toy_target: Path
) -> None:
    config = linear_run(tmp_path, toy_target)
    filler = fill(disk)
    with pytest.raises(ConfigError, match=NO_ROOM + "Make room there, or try: output_dir=DIR"):
        train(*load(config, f"output_dir={disk / 'run'}"))
    assert list(disk.iterdir()) == [filler]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "what"), [(0, "metrics.jsonl"), (1, "step-00000006"), (6, "step-00000006")]
)
def test_a_run_that_cannot_go_on_keeps_its_last_checkpoint(
    disk: Path, tmp_path: Path, toy_target: Path, pages: int, what: str
) -> None:
    config, run = linear_run(tmp_path, toy_target), disk / "run"
    options = (f"output_dir={run}", "train.keep=9")
    train(*load(config, *options, "train.max_steps=3"))
    before = state(run)
    filler = fill(disk, pages)
    with pytest.raises(RunError, match=NO_ROOM + "The checkpoints before it are whole") as error:
        train(*load(config, *options))
    refused(RunError, what, error.value)
    after = state(run)
    assert before.pop("metrics.jsonl")
    assert after.pop("metrics.jsonl")
    assert after == before
    filler.unlink()
    train(*load(config, *options))
    assert [path.name for path in checkpoints(run)] == ["step-00000003", "step-00000006"]
    assert [row["step"] for row in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert "2 checkpoints are as they were written" in str(verify_draft(run))


@pytest.mark.slow
@pytest.mark.parametrize(("pages", "what"), [(0, "metrics.jsonl"), (6, "step-00000006")])
def test_ranks_that_cannot_go_on_say_it_once(
    disk: Path, tmp_path: Path, toy_target: Path, pages: int, what: str
) -> None:
    config, run = linear_run(tmp_path, toy_target), disk / "run"
    options = (f"output_dir={run}", "train.keep=9")
    train(*load(config, *options, "train.max_steps=3"))
    before = state(run)
    filler = fill(disk, pages)
    two = ("train", "-c", str(config), "--nproc", "2", *options)
    process = cli(*two)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert err.count("error") == 1
    # Both ranks write: whichever meets the full disk first is the one that says so.
    assert re.search(rf"error( \(rank 1\))?: (checkpoint )?{run}.*{what} {NO_ROOM}", err), err
    after = state(run)
    assert before.pop("metrics.jsonl")
    assert after.pop("metrics.jsonl")
    assert after == before
    filler.unlink()
    assert "finished at step 6/6" in finish(cli(*two))
    assert "2 checkpoints are as they were written" in str(verify_draft(run))


@pytest.mark.slow
def test_answers_that_find_no_room_end_a_run_whose_data_grows(
    disk: Path, tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = linear_run(tmp_path, toy_target), disk / "run"
    options = (*GROWS, f"regenerate.prompts=[{tmp_path / 'train.jsonl'}]", f"output_dir={run}")
    options = (*options, "train.max_steps=6")
    answer = Shares._answer
    fillers: list[Path] = []
    before: dict[str, str] = {}

    def without_room(self: Shares, share: tuple[int, int]) -> None:
        if share[0] == 3:  # the second share
            before.update(state(run / "regenerated"), **state(run / "checkpoints"))
            fillers.append(fill(disk))
        answer(self, share)

    with monkeypatch.context() as patch:
        patch.setattr(Shares, "_answer", without_room)
        with pytest.raises(RunError, match=NO_ROOM + "Make room there. Start the same") as error:
            train(*load(config, *options, "train.save_every=3"))
    refused(RunError, "did not come: " + str(run / "regenerated"), error.value)
    assert {**state(run / "regenerated"), **state(run / "checkpoints")} == before
    assert len([name for name in before if name.endswith(".jsonl")]) == 1
    fillers[0].unlink()
    assert train(*load(config, *options)).finished
    assert sorted(state(run / "regenerated")) == [file_of((0, 3)), file_of((3, 6))]


def write_lines(metrics: MetricsFile) -> None:
    for step in range(2, 1000):
        metrics.log(step, {"loss": 1.0})


def test_a_line_of_metrics_is_written_whole_or_not(disk: Path) -> None:
    metrics = MetricsFile(disk)
    metrics.log(1, {"loss": 1.0})
    before = metrics.path.read_bytes()
    fill(disk)
    with pytest.raises(RunError, match=r"metrics\.jsonl " + NO_ROOM):
        write_lines(metrics)
    text = metrics.path.read_bytes()
    assert text.startswith(before)
    assert text.endswith(b"}\n")


@pytest.mark.slow
def test_export_evaluation_and_plots(disk: Path, tmp_path: Path, toy_target: Path) -> None:
    config = linear_run(tmp_path, toy_target)
    train(*load(config, "train.max_steps=3"))
    export_checkpoint(tmp_path / "run", "hf", disk / "draft", force=False)
    report = (
        f"output_dir={disk}",
        f"eval.prompts.chat={tmp_path / 'train.jsonl'}",
        "eval.limit=1",
        "eval.max_new_tokens=2",
        "eval.compare=false",
    )
    before = state(disk)
    fill(disk)
    with pytest.raises(CheckpointError, match=NO_ROOM + "Make room there, or .* -o") as error:
        export_checkpoint(tmp_path / "run", "hf", disk / "draft", force=True)
    refused(CheckpointError, str(disk / "draft"), error.value)
    run, strategy = load(config, *report)
    with pytest.raises(RunError, match=NO_ROOM + "Make room there, then run") as failed:
        evaluate(run, strategy, restore(run, strategy, tmp_path / "run").draft)
    refused(RunError, "eval/report.json", failed.value)
    with pytest.raises(RunError, match=r"loss\.png " + NO_ROOM):
        plot_loss(tmp_path / "run" / "metrics.jsonl", disk / "loss.png")
    assert state(disk) == before
    assert read_export(disk / "draft").weights


@pytest.mark.slow
def test_a_capture_goes_on_when_there_is_room(disk: Path, tmp_path: Path, toy_target: Path) -> None:
    config = linear_run(tmp_path, toy_target)
    options = (f"data.capture_dir={disk / 'capture'}", "capture.shard_tokens=200")
    filler = fill(disk)
    with pytest.raises(CaptureError, match=NO_ROOM + r"Safe so far: 0 samples in 0 shards\. "):
        run_capture(*load(config, *options))
    assert state(disk / "capture") == {}
    filler.unlink()
    filler = fill(disk, 25)
    with pytest.raises(CaptureError, match=NO_ROOM + r"Safe so far: [1-9]\d* samples in [1-9]"):
        run_capture(*load(config, *options))
    before = state(disk / "capture")
    filler.unlink()
    run_capture(*load(config, *options))
    after = state(disk / "capture")
    assert {n: d for n, d in after.items() if n in before and n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }
    assert "20 samples are as they should be" in str(
        verify_directory(disk / "capture", None, None, 0)
    )


def test_answers_and_packages(disk: Path) -> None:
    with Journal(disk / "answers.jsonl") as journal:
        journal.append([{"id": "a"}])
        fill(disk)
        with pytest.raises(DataError, match="cannot be written: No space left"):
            journal.append([{"id": "b", "text": "x" * 2 * PAGE}])
        assert [row["id"] for row in journal.rows()] == ["a"]
    with pytest.raises(ConfigError, match=NO_ROOM + "Make room there, or try: -o"):
        write_package("my-method", "method", disk / "new")
    assert not (disk / "new").exists()


def test_a_file_system_that_cannot_be_written_to(
    disk: Path, tmp_path: Path, toy_target: Path
) -> None:
    config = linear_run(tmp_path, toy_target)
    (disk / "run").mkdir()
    assert mount(disk, MS_REMOUNT | MS_RDONLY) == 0
    message = "cannot be written: Read-only file system"
    with pytest.raises(ConfigError, match=message):
        train(*load(config, f"output_dir={disk / 'run'}"))
    with pytest.raises(ConfigError, match=message):
        train(*load(config, f"output_dir={disk / 'new'}"))
    with pytest.raises(CaptureError, match=message):
        run_capture(*load(config, f"data.capture_dir={disk / 'capture'}"))
    with pytest.raises(CheckpointError, match=message):
        write_export(Export(config={}, weights={"w": torch.ones(2)}), disk / "draft", {})
    with pytest.raises(DataError, match=message):
        Journal(disk / "answers.jsonl")
    with pytest.raises(ConfigError, match=message):
        write_package("my-method", "method", disk / "package")
