"""Trackio's local database after a real run, read back with sqlite."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from specforge_trackers.common import need

from specforge_core.errors import ConfigError
from specforge_core.testing.runs import lines, load, write_run
from specforge_core.train.run import train


def test_a_library_that_is_missing_is_named_before_the_training() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'specforge-trackers\[no_such_library\]'"):
        need("no_such_library")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where Trackio writes; it is read once, when Trackio is imported."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    from trackio.utils import TRACKIO_DIR

    yield Path(TRACKIO_DIR)
    del os.environ["TRACKIO_DIR"]
    if before is not None:
        os.environ["TRACKIO_DIR"] = before


@pytest.fixture(scope="module")
def run(database: Path, tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    """Return the output directory of a run of 4 steps that was started twice."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"batch_size": 2, "save_every": 2}
    strategy = {"name": "linear"}
    config = write_run(folder, toy_target, conversations=8, strategy=strategy, train=settings)
    on = ("plugins.trackio.project=mine", "plugins.trackio.name=one")
    train(*load(config, *on, "train.max_steps=2"))
    train(*load(config, *on, "train.max_steps=4"))
    return folder / "run"


def ask(database: Path, query: str) -> list[Any]:
    with sqlite3.connect(database / "mine.db") as found:
        rows = found.execute(query).fetchall()
    found.close()
    return rows


@pytest.mark.slow
def test_every_number_the_config_and_the_checkpoints_are_read_back(
    run: Path, database: Path
) -> None:
    kept = {row.pop("step"): row for row in lines(run)}
    assert sorted(kept) == [1, 2, 3, 4]
    rows = ask(database, "SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id")
    assert len({row[0] for row in rows}) == 1
    assert {row[1] for row in rows} == {"one"}
    told = [(step, json.loads(text)) for _, _, step, text in rows]
    numbers = {step: found for step, found in told if "loss" in found}
    assert numbers == {step: pytest.approx(row) for step, row in kept.items()}
    name = "event/checkpoint"
    events = [(step, found[name]) for step, found in told if name in found]
    assert [step for step, _ in events] == [2, 4]
    assert json.loads(events[1][1])["path"] == str(run / "checkpoints" / "step-00000004")
    pictures = [(step, found["curves"]) for step, found in told if "curves" in found]
    assert [step for step, _ in pictures] == [2, 4]
    assert all((database / "media" / one["file_path"]).is_file() for _, one in pictures)
    ((text,),) = ask(database, "SELECT config FROM configs")
    assert json.loads(text)["strategy"] == "linear"


@pytest.mark.slow
def test_a_run_from_the_start_is_another_one(run: Path, database: Path, tmp_path: Path) -> None:
    config = run.parent / "run.yaml"
    on = ("plugins.trackio.project=mine", "plugins.trackio.name=one", "train.max_steps=1")
    train(*load(config, *on, f"output_dir={tmp_path / 'other'}"))
    assert len(ask(database, "SELECT DISTINCT run_id FROM metrics")) == 2
