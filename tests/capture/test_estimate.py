from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from specforge_core.capture.estimate import Size
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.cli import cli
from specforge_core.errors import ConfigError, DataError
from specforge_core.strategy import Strategy
from specforge_core.testing.runs import load, write_run
from specforge_core.text import in_time, in_units
from specforge_core.train import memory
from specforge_core.train.plan import plan_run
from specforge_core.types import Export

Usage = namedtuple("Usage", "total used free")


def seconds_of(text: str) -> float:
    value, unit = text.split()
    return float(value.replace(",", "")) * {"s": 1, "min": 60, "h": 3600}[unit]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    strategy, settings = {"name": "linear"}, {"batch_size": 2, "epochs": 3}
    return write_run(folder, toy_target, conversations=9, strategy=strategy, train=settings)


def capture(config: Path, directory: Path, *more: str) -> Any:
    arguments = ["capture", "-c", str(config), f"data.capture_dir={directory}", *more]
    return CliRunner().invoke(cli, arguments, standalone_mode=False)


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - free, free))


def test_an_estimate_says_what_the_capture_then_takes_and_writes_nothing(
    config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "capture"
    told = yaml.safe_load(capture(config, directory, "--estimate").stdout)["estimate"]
    assert not directory.exists()
    assert capture(config, directory).exception is None
    manifest = CaptureManifest.read(directory)
    assert (told["samples"], told["tokens"]) == (manifest.num_samples, manifest.num_tokens)
    size = Size.of(manifest.identity.spec())
    assert told["bytes_per_token"] == size.per_token
    total = size.total(manifest.num_samples, manifest.num_tokens)
    assert told["total"] == in_units(total)
    headers = 1024 * len(manifest.shards)
    assert total < sum(shard.num_bytes for shard in manifest.shards) < total + headers
    took = told["tokens"] / told["tokens_per_second"]
    assert seconds_of(told["time"]) == pytest.approx(took, rel=0.01)
    assert told["memory"]["host"].endswith("B")


def test_what_the_disk_has_no_room_for_needs_a_yes(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "capture"
    full(monkeypatch, 1000)
    refused = capture(config, directory)
    assert isinstance(refused.exception, ConfigError)
    assert "1 KB are free. Make room, train online, or try" in str(refused.exception)
    assert "--yes" in str(refused.exception)
    assert not (directory / "manifest.json").exists()

    questions: list[str] = []

    def confirm(text: str, **options: object) -> None:
        questions.append(text)
        raise click.Abort

    with monkeypatch.context() as asking:
        asking.setattr(click, "confirm", confirm)
        asking.setattr("specforge_core.capture.commands.on_terminal", lambda: True)
        assert isinstance(capture(config, directory).exception, click.Abort)
    assert questions[0].endswith("1 KB are free. Begin all the same?")
    assert not (directory / "manifest.json").exists()
    assert capture(config, directory, "--yes").exception is None
    assert CaptureManifest.read(directory).complete
    # nothing is left to capture, so nothing is asked
    assert capture(config, directory).exception is None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 KB"),
        (999_700, "1 MB"),
        (12.3e9, "12.3 GB"),
        (2e15, "2,000 TB"),
    ],
)
def test_bytes_are_written_for_readers(count: float, text: str) -> None:
    assert in_units(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.36, "0.36 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (7199, "120 min"),
        (9000, "2.5 h"),
        (432000, "5 days"),
        (1e9, "11,574 days"),
    ],
)
def test_times_are_written_for_readers(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


def test_a_plan_measures_some_steps_and_writes_nothing(config: Path) -> None:
    run, strategy = load(config)
    plan = yaml.safe_load(plan_run(run, strategy, 2, measure=True))["plan"]
    told = plan["measured"]
    assert told["steps"] == 7  # 9 samples, 3 epochs, 4 samples a step
    seconds = told["seconds_per_step"]
    assert min(seconds.values()) > 0
    assert seconds_of(told["time"]) == pytest.approx(7 * sum(seconds.values()), rel=0.02)
    spec = Size.of(strategy.adapter(run.strategy, _target(run)).spec)
    assert told["captured_states"]["bytes_per_token"] == spec.per_token
    assert told["captured_states"]["tokens"] > 9 * 10
    assert told["checkpoint"].endswith("B")
    largest = told["memory_at_most"]
    assert {"of_draft_and_step", memory.STATES, memory.GRADIENTS} <= largest.keys()
    assert not run.output_dir.exists()


def test_a_plan_of_replicas_is_measured_in_one_process(config: Path) -> None:
    run, strategy = load(config, "train.shard_size=2")
    plan = yaml.safe_load(plan_run(run, strategy, 4, measure=True))["plan"]
    assert plan["measured"]["tokens_per_second"] > 0
    with pytest.raises(ConfigError, match=r"shard_size=2 does not divide the 3 rank"):
        plan_run(run, strategy, 3)


def test_a_plan_of_what_is_not_captured_yet_measures_the_target(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, exported = Strategy.export, list[Tensor]()

    def noting(*of: Any) -> Export:
        found = export(*of)
        exported.extend(found.weights.values())
        return found

    monkeypatch.setattr(Strategy, "export", noting)
    run, strategy = load(config, f"data.capture_dir={tmp_path / 'capture'}")
    plan = yaml.safe_load(plan_run(run, strategy, 1, measure=True))["plan"]
    assert plan["data"].endswith("which is not captured yet")
    assert plan["measured"]["seconds_per_step"]["data"] > 0
    assert plan["measured"]["exports"]["hf"] == "yes"
    assert "cannot export to format 'vllm'" in plan["measured"]["exports"]["vllm"]
    assert exported
    assert all(is_fake(weight) for weight in exported)  # no copy of the draft was made
    assert not (tmp_path / "capture").exists()


def test_a_plan_of_what_cannot_be_trained_is_refused(config: Path) -> None:
    run, strategy = load(config, "data.train=[missing.jsonl]")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        plan_run(run, strategy, 1, measure=True)


def test_too_little_memory_is_what_a_plan_says(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("specforge_core.train.probe._steps", full)
    plan = yaml.safe_load(plan_run(*load(config), 1, measure=True))["plan"]
    assert plan["measured"].startswith("nothing: there is too little memory")


def _target(run: Any) -> Any:
    from specforge_core.target.info import load_target_info

    return load_target_info(run.target)


def test_an_answer_can_only_come_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from specforge_core.capture.commands import on_terminal

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert on_terminal()
