"""The way of one sample from a line of JSON to a gradient goes through each folder once.

What is counted: a function of the core that is handed the sample as an argument, and one that
returns or yields it, in whatever form it has there (the line, the messages, the tokens, a Prompt,
a TargetCapture, a Sample, a batch).  Iterators that wait until the next one pulls are not counted
for having it below them, nor are functions that have only an index, or the whole set of prompts.
Stays in one folder, one after the other, count as one.

Before the first step the first samples are captured twice and compared; that is a check on
throw-away copies, so the sample that is followed is a later one.
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import specforge_core
from specforge_core.capture.job import Job, run_capture
from specforge_core.data.order import epoch_order
from specforge_core.testing.runs import load, write_run
from specforge_core.train.run import train

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

CORE = str(Path(specforge_core.__file__).parent)
FOLDERS = ("data", "target", "capture", "batches", "train")
MARK = "the one that is followed"
COUNT = 24
PLACE = epoch_order(COUNT, 0, 0)[5]  # the sixth, beyond the first few, which are checked


class Walk:
    """Notes the folders of all functions that the sample passes through."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.found: list[tuple[str, str]] = []

    def __enter__(self) -> Walk:
        threading.setprofile(self._see)  # the thread that makes batches
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    @property
    def folders(self) -> list[str]:
        return [folder for folder, _ in groupby(folder for folder, _ in self.found)]

    @property
    def shown(self) -> str:
        return " ".join(f"{folder}:{name}" for folder, name in self.found)

    def _see(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(CORE):
            return
        folder = Path(code.co_filename).relative_to(CORE).parts[0]
        if folder not in FOLDERS or code.co_name.startswith("<"):  # a comprehension, say
            return
        if event == "call":
            if code.co_flags & inspect.CO_GENERATOR:
                return  # it is only woken up
            names = code.co_varnames[: code.co_argcount]
            value = [frame.f_locals.get(name) for name in names if name != "self"]
        if self._holds(value):
            self.found.append((folder, code.co_name))

    def _holds(self, value: Any, depth: int = 5) -> bool:
        if isinstance(value, str):
            return MARK in value
        if isinstance(value, bytes):
            return MARK.encode() in value
        if isinstance(value, torch.Tensor):
            same = value.numel() == len(self.ids) and not value.is_floating_point()
            return same and value.flatten().tolist() == self.ids
        if depth == 0:
            return False
        if isinstance(value, Mapping):
            return any(self._holds(part, depth - 1) for part in value.values())
        if isinstance(value, list | tuple):
            return value == self.ids or any(self._holds(part, depth - 1) for part in value[:99])
        if is_dataclass(value) and not isinstance(value, type):
            parts = (getattr(value, field.name) for field in fields(value))
            return any(self._holds(part, depth - 1) for part in parts)
        return False


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    # few of the samples, so that the next epoch, which comes to each of them again, is not begun
    options = {"max_steps": 6, "batch_size": 1, "save_every": 99}
    path = write_run(
        tmp_path,
        toy_target,
        conversations=COUNT,
        strategy={"name": "linear"},
        train=options,
        capture={"window": 1, "prefetch": 1},
    )
    data = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[PLACE]["messages"][-1]["content"] = f"This is {MARK}."
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def follow(config: Path, work: Callable[[], object]) -> Walk:
    ids = Job.open(*load(config)).prompts()[PLACE].input_ids.tolist()
    with Walk(ids) as walk:
        work()
    return walk


def test_online_a_sample_enters_each_folder_once(config: Path) -> None:
    walk = follow(config, lambda: train(*load(config)))
    assert walk.folders == list(FOLDERS), walk.shown
    steps = {name for folder, name in walk.found if folder == "train"}
    assert "_forward" in steps  # whose loss is differentiated next


def test_offline_a_sample_enters_each_folder_once(config: Path, tmp_path: Path) -> None:
    offline = f"data.capture_dir={tmp_path / 'capture'}"
    captured = follow(config, lambda: run_capture(*load(config, offline)))
    assert captured.folders == ["data", "target", "capture"], captured.shown
    trained = follow(config, lambda: train(*load(config, offline)))
    assert trained.folders == ["capture", "batches", "train"], trained.shown
