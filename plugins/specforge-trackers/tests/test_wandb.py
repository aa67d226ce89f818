"""Offline files of a real run, read back as `wandb sync` reads them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_core.testing.runs import lines, load, write_run
from specforge_core.train.run import train

pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
pytestmark = pytest.mark.slow  # each start of a run starts wandb's own process
BLOCK, HEAD, FIRST = 32768, 7, 7  # bytes of the log's blocks, of a record's header, of the file's


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a file of wandb, which has the layout of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), FIRST, b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
        checksum = int.from_bytes(data[place : place + 4], "little")
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        body = data[place + HEAD : place + HEAD + length]
        if len(body) < length:  # it is being written
            return
        assert checksum == zlib.crc32(data[place + 6 : place + HEAD + length])
        whole, place = whole + body, place + HEAD + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


KEYS = ("WANDB_API_KEY", "HF_TOKEN")
KEY = "a1b2c3d4e5" * 4  # of the form that wandb takes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    """Return the output directory of a run of 4 steps, and what it did is 2 starts."""
    folder = tmp_path_factory.mktemp("wandb")
    settings = {"batch_size": 2, "save_every": 2}
    strategy = {"name": "linear"}
    config = write_run(folder, toy_target, conversations=8, strategy=strategy, train=settings)
    on = ("plugins.wandb.mode=offline", "plugins.wandb.project=mine")
    with pytest.MonkeyPatch.context() as patch:
        for name in KEYS:
            patch.setenv(name, KEY)
        train(*load(config, *on, "train.max_steps=2"))
        train(*load(config, *on, "train.max_steps=4"))
    return folder / "run"


@pytest.fixture(scope="module")
def starts(run: Path) -> list[list[Any]]:
    return [whole(file) for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


def whole(file: Path) -> list[Any]:
    """Return all records of a run that ended: wandb's own process writes the last ones behind."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = list(records(file))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [
        record.history.item for record in found if record.WhichOneof("record_type") == "history"
    ]
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in row}
        for row in rows
    ]


def test_every_number_is_at_its_step(run: Path, starts: list[list[Any]]) -> None:
    rows = [row for found in starts for row in history(found) if "loss" in row]
    kept = lines(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len(kept) == 4
    for mine, its in zip(kept, rows, strict=True):
        assert {name: its[name] for name in mine} == pytest.approx(mine)


def test_no_key_is_in_what_was_written(run: Path, starts: list[list[Any]]) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(starts) == 2
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_both_starts_are_one_run_and_tell_its_config(starts: list[list[Any]]) -> None:
    told = [record.run for found in starts for record in found if record.HasField("run")]
    assert len(starts) == 2
    assert len({one.run_id for one in told}) == 1
    assert {(one.project, one.display_name) for one in told} == {("mine", "run")}
    config = {item.key: json.loads(item.value_json) for item in told[0].config.update}
    assert config["strategy"] == "linear"
    assert config["config"]["train"]["max_steps"] == 2


def test_checkpoints_are_events_and_artifacts_that_lead_there(
    run: Path, starts: list[list[Any]]
) -> None:
    events = [row for found in starts for row in history(found) if "event/checkpoint" in row]
    assert [row["step"] for row in events] == [2, 4]
    paths = [json.loads(row["event/checkpoint"])["path"] for row in events]
    assert paths == [str(run / "checkpoints" / f"step-{step:08}") for step in (2, 4)]
    artifacts = [
        record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        for found in starts
        for record in found
        if record.HasField("artifact") or record.request.HasField("log_artifact")
    ]
    assert [one.type for one in artifacts] == ["checkpoint", "checkpoint"]
    assert [json.loads(one.metadata)["path"] for one in artifacts] == paths
    refs = [entry.ref for entry in artifacts[1].manifest.contents]
    assert f"{Path(paths[1]).as_uri()}/state.json" in refs


def test_each_start_ends_with_a_picture_of_the_run(run: Path, starts: list[list[Any]]) -> None:
    for found, step in zip(starts, (2, 4), strict=True):
        (row,) = [row for row in history(found) if "curves" in row or "curves._type" in row]
        assert row["step"] == step
    pictures = list((run / "wandb").glob("offline-run-*/files/media/images/curves*.png"))
    assert len(pictures) == 2
