"""A third party's optimizer, schedule and tracker, used by name; the core's come by hooks too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from specforge_core.config import TargetConfig, TrainConfig
from specforge_core.errors import ConfigError, PluginError
from specforge_core.strategy import Strategy
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import lines, load, losses, write_run
from specforge_core.train.run import train
from specforge_core.types import Draft, NotServed

OPTIMIZER = """
import torch
from specforge_core import hookimpl

@hookimpl
def specforge_optimizers(train, draft):
    if train.optimizer == "plain":
        return [torch.optim.SGD(draft.model.parameters(), lr=train.learning_rate)]

@hookimpl
def specforge_schedule(train):
    if train.schedule == "steps":
        return lambda progress: 1.0 if progress < 0.5 else 0.25
"""
RECORDER = """
import json
from pathlib import Path
from pydantic import Field
from specforge_core import hookimpl
from specforge_core.config import Section

class Options(Section):
    "Where numbers go."
    path: str = Field(description="A file.")
    fails_at: int | None = None

class Recorder:
    def __init__(self, options):
        self.options = options
    def write(self, *row):
        with Path(self.options.path).open("a") as file:
            file.write(json.dumps(row) + chr(10))
    def start(self, info):
        self.write("start", info["step"], info["strategy"], info["config"]["train"]["max_steps"])
    def log(self, step, metrics):
        if step == self.options.fails_at:
            raise OSError("the disk is full")
        self.write("log", step, metrics["loss"])
    def event(self, name, values):
        self.write("event", name, values["step"])
    def close(self):
        self.write("close")

@hookimpl
def specforge_plugin_config(): return Options

@hookimpl
def specforge_tracker(run):
    return Recorder(run.plugins["recorder"])
"""


@pytest.fixture
def config(fake_site: FakeSite, tmp_path: Path, toy_target: Path) -> Path:
    for name, source in (("plain", OPTIMIZER), ("recorder", RECORDER)):
        group = {"specforge.plugins": {name: f"acme_{name}"}}
        fake_site.dist(f"acme-{name}", "0.3", group, module=f"acme_{name}", source=source)
    settings = {"max_steps": 4, "batch_size": 2, "learning_rate": 0.05, "warmup_ratio": 0}
    strategy = {"name": "linear"}
    return write_run(tmp_path, toy_target, conversations=8, strategy=strategy, train=settings)


def rates(output_dir: Path) -> list[float]:
    return [row["learning_rate"] for row in lines(output_dir)]


def test_an_optimizer_and_a_schedule_are_used_by_name(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    mine = ("train.optimizer=plain", "train.schedule=steps")
    train(*load(config, *mine, f"output_dir={tmp_path / 'other'}"))
    assert rates(tmp_path / "other") == [0.05, 0.05, 0.0125, 0.0125]
    one, other = losses(tmp_path / "run"), losses(tmp_path / "other")
    assert one[0] == other[0]  # the same start,
    assert one[1:] != other[1:]  # and other steps


def test_a_package_s_optimizer_keeps_its_states_as_asked_or_is_refused(config: Path) -> None:
    options = ("train.optimizer=plain", "train.optimizer_dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"is bfloat16, and SGD, which train\.optimizer=plain "):
        train(*load(config, *options))


@pytest.mark.parametrize(("name", "kinds"), [("adamw", ["AdamW"]), ("muon", ["AdamW", "Muon"])])
def test_the_core_s_optimizers_come_through_the_hook(
    fake_site: FakeSite, name: str, kinds: list[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    draft = Draft(model=model, shard=(model[0],))
    found = Strategy.load("linear").optimizers(TrainConfig(optimizer=name), draft)
    names = [type(optimizer).__name__.removeprefix("Float32") for optimizer in found]
    assert sorted(names) == kinds
    owned = [p for optimizer in found for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize(
    ("name", "factors"), [("constant", [1, 1, 1]), ("cosine", [1, 0.5, 0]), ("wsd", [1, 1, 0])]
)
def test_the_core_s_schedules_come_through_the_hook(name: str, factors: list[float]) -> None:
    schedule = Strategy.load("linear").schedule(TrainConfig(schedule=name))
    assert [schedule(place) for place in (0.0, 0.5, 1.0)] == pytest.approx(factors)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train.optimizer=adamm", "train.optimizer 'adamm' is not provided by any installed"),
        ("train.schedule=cosin", "train.schedule 'cosin' is not provided by any installed"),
    ],
)
def test_a_name_that_nobody_has_is_an_error(config: Path, option: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        train(*load(config, option))


@pytest.mark.slow
def test_a_tracker_is_off_unless_named_and_told_everything(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    train(*load(config))
    assert not out.exists()
    named = (f"plugins.recorder.path={out}", f"output_dir={tmp_path / 'other'}")
    train(*load(config, *named, "train.max_steps=2"))
    rows = [json.loads(line) for line in out.read_text("utf-8").rstrip("\n").split("\n")]
    assert rows[0] == ["start", 0, "linear", 2]
    assert [row[:2] for row in rows[1:3]] == [["log", 1], ["log", 2]]
    assert [row[2] for row in rows[1:3]] == losses(tmp_path / "other")
    assert rows[3:] == [["event", "checkpoint", 2], ["close"]]
    train(*load(config, *named))  # goes on
    rows = [json.loads(line) for line in out.read_text("utf-8").rstrip("\n").split("\n")][5:]
    assert rows[0] == ["start", 2, "linear", 4]
    assert [row[1] for row in rows if row[0] == "log"] == [3, 4]


def test_a_tracker_that_fails_warns_once_and_training_goes_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows"
    report = train(*load(config, f"plugins.recorder.path={out}", "plugins.recorder.fails_at=2"))
    assert report.step == 4
    assert len(losses(tmp_path / "run")) == 4  # the core's own tracker goes on
    rows = [json.loads(line)[:2] for line in out.read_text("utf-8").rstrip("\n").split("\n")]
    assert rows == [["start", 0], ["log", 1]]
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("the tracker of acme-recorder 0.3 failed (OSError: the disk is full)") == 1


def test_a_section_is_checked_as_the_core_s_own(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.recorder\.path: required, and missing"):
        load(config, "plugins.recorder={}")
    for name, told in (("recordr", r"Did you mean plugins\.recorder\?"), ("x", "pip install")):
        with pytest.raises(ConfigError, match=rf"plugins\.{name}: no installed plugin .*{told}"):
            load(config, f"plugins.{name}={{}}")


SERVES = """
from specforge_core import hookimpl

@hookimpl
def specforge_serve(target, export, draft_tokens): return None
"""


def test_an_engine_that_serves_no_drafts_names_those_that_do(
    fake_site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", "sglang")
    target = TargetConfig(path="t")
    told = Strategy.load("linear").serve(target, Path("export"), 3)
    assert isinstance(told, NotServed)
    assert told.reason == (
        "target.engine=transformers serves no drafts. Try: pip install specforge-sglang, then "
        "target.engine=sglang"
    )
    for name in ("quick", "able"):
        group = {"specforge.plugins": {name: f"acme_{name}"}}
        fake_site.dist(f"acme-{name}", "1.0", group, module=f"acme_{name}", source=SERVES)
    told = Strategy.load("linear").serve(target, Path("export"), 3)
    assert isinstance(told, NotServed)
    assert told.reason.endswith("Try: target.engine=able, or target.engine=quick")
