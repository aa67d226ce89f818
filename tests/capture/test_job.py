from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specforge_core.capture.job import Job, run_capture
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader, read_token_counts
from specforge_core.config import RunConfig
from specforge_core.data import tokenrows
from specforge_core.data.files import open_source
from specforge_core.data.order import epoch_order
from specforge_core.data.prompts import PromptSet
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.load import load_config
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.testing.close import close
from specforge_core.testing.forked import SECONDS, Forked, cli
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import write_conversations
from specforge_core.types import (
    CaptureSpec,
    Prompt,
    Sample,
    TargetCapture,
)

from ..data.prompted import load_prompts

SOURCE = """
    import os, time
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    from specforge_core import hookimpl
    from specforge_core.config import StrategyConfig
    from specforge_core.types import CaptureSpec, Field, Problem

    class Config(StrategyConfig):
        longest: int = 10_000
        fail: str = ""

    @dataclass
    class Adapter:
        spec: CaptureSpec
        config: Config

        def __call__(self, capture):
            time.sleep(float(os.environ.get("TINY_SLEEP", 0)))
            directory, _, most = os.environ.get("TINY_HELD", "").partition(":")
            while directory and len(list(Path(directory).glob("shard-*"))) >= int(most):
                time.sleep(0.1)  # until it is killed
            if len(capture.input_ids) > self.config.longest:
                return None
            hidden = torch.cat([capture.hidden_states[i] for i in self.spec.layers], -1)
            if self.config.fail == "zero" and capture.index == 3:
                hidden = hidden / 0
            if self.config.fail == "dtype":
                hidden = hidden.bfloat16()
            return {
                "input_ids": capture.input_ids,
                "loss_mask": capture.loss_mask,
                "hidden": hidden,
            }

    @hookimpl
    def specforge_config():
        return Config

    @hookimpl
    def specforge_adapter(config, target):
        tokens = Field(shape=(None,), dtype="int64")
        hidden = Field(shape=(None, 2 * target.hidden_size), dtype="float32")
        fields = {"input_ids": tokens, "loss_mask": tokens, "hidden": hidden}
        return Adapter(CaptureSpec(layers=(1, 3), fields=fields), config)

    @hookimpl
    def specforge_verify_capture(config, sample, fresh):
        if config.fail == "verify":
            return [Problem(where="tiny", message=f"fresh has {len(fresh.input_ids)} tokens")]

    @hookimpl
    def specforge_draft(): ...

    @hookimpl
    def specforge_train_step(): ...
"""


@pytest.fixture
def config(env: FakeSite, tmp_path: Path, toy_target: Path) -> Path:
    """A capture of 40 ragged conversations, in shards of a few samples."""
    env.strategy("tiny", SOURCE)
    data = write_conversations(tmp_path / "train.jsonl", 40)
    raw = {
        "target": {"path": str(toy_target), "batch_tokens": 256, "device": "cpu"},
        "strategy": {"name": "tiny"},
        "data": {"train": [str(data)], "capture_dir": str(tmp_path / "capture")},
        "capture": {"window": 7, "shard_tokens": 400},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load_data(run: RunConfig) -> PromptSet:
    return load_prompts(run.data, load_tokenizer(run.target), 260, lambda s, _: open_source(s))


def lengths(config: Path) -> list[int]:
    return sorted(len(prompt.input_ids) for prompt in load_data(load_config(config)[0]))


def read_back(directory: Path) -> dict[int, Sample]:
    """Return every sample by its prompt, after checking that none is there twice."""
    reader = ShardReader(directory, CaptureManifest.read(directory))
    indices = [reader.prompt_index(i) for i in range(len(reader))]
    assert len(set(indices)) == len(indices)
    return {index: reader[i] for i, index in enumerate(indices)}


def test_a_capture_holds_every_prompts_states_in_training_order(config: Path, tmp_path: Path):
    run, strategy = load_config(config)
    manifest = run_capture(run, strategy)
    assert manifest == CaptureManifest.read(tmp_path / "capture")
    assert manifest.complete
    assert len(manifest.shards) > 3
    data = load_data(run)
    assert manifest.num_samples == manifest.num_prompts == len(data) == 40
    assert list(read_back(tmp_path / "capture")) == epoch_order(40, run.train.seed, 0)
    engine = TransformersEngine.load(run.target, torch.device("cpu"))
    adapter = strategy.adapter(run.strategy, engine.info)
    for index, sample in read_back(tmp_path / "capture").items():
        (capture,) = engine.capture([data[index]], adapter.spec)
        alone = adapter(capture)
        assert alone is not None
        assert torch.equal(sample["input_ids"], alone["input_ids"])
        assert torch.equal(sample["loss_mask"], alone["loss_mask"])
        # six layers of width 32 and 64, in another batch
        close(sample["hidden"], alone["hidden"], terms=6 * (4 * 32 + 64))
    counts = read_token_counts(tmp_path / "capture", manifest)
    assert counts is not None
    assert torch.equal(counts, data.token_counts(260))


def test_a_vocabulary_is_hashed_once(config: Path, monkeypatch: pytest.MonkeyPatch):
    job = Job.open(*load_config(config))
    origin = tokenrows.Fingerprint.of(job.tokenizer, job.identity.target_fingerprint)
    monkeypatch.delattr(tokenrows, "tokenizer_fingerprint")
    assert job.asked().fill.make.origin == origin


def test_skipped_prompts_are_counted_and_not_tried_again(config: Path, tmp_path: Path):
    longest = lengths(config)[25]
    manifest = run_capture(*load_config(config, (f"strategy.longest={longest}",)))
    short = [n for n in lengths(config) if n <= longest]
    assert manifest.num_samples == len(short) == 40 - manifest.num_skipped
    assert 0 < manifest.num_skipped < 40


def test_a_complete_capture_is_not_touched_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "capture").mkdir()
    (tmp_path / "capture/notes.txt").touch()
    first = run_capture(*load_config(config))
    assert "capture is not empty (notes.txt): what the capture" in capsys.readouterr().err
    times = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "capture").glob("*.*")}
    assert run_capture(*load_config(config)) == first
    told = capsys.readouterr().err
    assert "was complete before, and nothing is captured." in told
    assert told.endswith(f"by: specforge verify {tmp_path / 'capture'}\n")
    assert "is not empty" not in told
    assert times == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "capture").glob("*.*")}
    counts = tmp_path / "capture/token_counts.safetensors"
    counts.write_bytes(counts.read_bytes()[:-1] + b"\1")
    with pytest.raises(CaptureError, match=r"token_counts\.safetensors is missing or damaged"):
        run_capture(*load_config(config))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.limit=20", r"begun with other prompts.*\(40 prompts then, 20 now\)"),
        ("train.seed=5", r"begun with other prompts, or another order"),
        ("data.max_length=1024", r"data\.max_length: 2048 in the capture, 1024 in this run"),
    ],
)
def test_a_directory_of_another_capture_is_refused(config: Path, override: str, message: str):
    run_capture(*load_config(config))
    with pytest.raises(CaptureError, match=message):
        run_capture(*load_config(config, (override,)))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("verify", r"the first sample \(prompt \d+\) cannot.*\n  tiny: fresh has \d+ tokens"),
        ("dtype", "field 'hidden': is bfloat16, the spec says float32"),
        ("zero", "prompt 3: field 'hidden' is not finite as the strategy's adapter returned it"),
    ],
)
def test_a_wrong_first_sample_writes_nothing(config: Path, tmp_path: Path, fail: str, message: str):
    with pytest.raises(CaptureError, match=message):
        run_capture(*load_config(config, (f"strategy.fail={fail}", "capture.shard_tokens=9999")))
    if fail != "zero":
        assert [f.name for f in (tmp_path / "capture").iterdir()] == [".lock"]
    else:
        assert CaptureManifest.read(tmp_path / "capture").num_samples == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.capture_dir=null", r"data\.capture_dir is not set"),
        ("data.train=[]", r"data\.train is empty"),
    ],
)
def test_what_is_missing_from_the_config_is_said(config: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        run_capture(*load_config(config, (override,)))


def test_a_batching_engine_that_mixes_up_sequences_is_caught_before_the_first_write(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, strategy = load_config(config)

    class Mixed(TransformersEngine):
        def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
            previous: Any = None
            for capture in super().capture(prompts, spec):
                states = dict(capture.hidden_states)
                if previous is not None:
                    for layer, state in states.items():
                        rows = min(len(state), len(previous[layer]))
                        states[layer] = torch.cat([previous[layer][:rows], state[rows:]])
                yield replace(capture, hidden_states=states)
                previous = states

    monkeypatch.setattr("specforge_core.target.engine.TransformersEngine", Mixed)
    with pytest.raises(CaptureError, match=r"(?s)first sample.*values: "):
        run_capture(run, strategy)
    assert not (tmp_path / "capture" / "manifest.json").exists()


# ---- kill -9 ----------------------------------------------------------------


def start(config: Path, site: Path, *overrides: str, **environment: str) -> Forked:
    env = {**os.environ, "PYTHONPATH": str(site), **environment}
    return cli("capture", "-c", str(config), *overrides, env=env)


def shards(directory: Path) -> int:
    try:
        return len(json.loads((directory / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_capture_killed_again_and_again_is_byte_for_byte_the_uninterrupted_one(
    config: Path, env: FakeSite, tmp_path: Path
):
    short = (f"strategy.longest={lengths(config)[30]}", "capture.shard_tokens=200")
    run, strategy = load_config(config, (*short, f"data.capture_dir={tmp_path / 'whole'}"))
    whole = run_capture(run, strategy)
    killed, seen = tmp_path / "capture", 0
    for stop in (1, 2, 4):
        held = f"{killed}:{stop + 2}"  # it does not end before it is killed
        process = start(config, env.path, *short, TINY_SLEEP="0.05", TINY_HELD=held)
        while shards(killed) < stop and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.03 * stop)  # into the middle of the next shard
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert not CaptureManifest.read(killed).complete
        read_back(killed)  # whole so far, nothing twice
        seen = max(seen, shards(killed))
    assert 4 <= seen < len(whole.shards)
    process = start(config, env.path, *short)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert CaptureManifest.read(killed) == whole
    for shard in whole.shards:
        assert (killed / shard.file).read_bytes() == (tmp_path / "whole" / shard.file).read_bytes()
