"""Every hook is called from real code paths, in the order of hookspecs.py."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from specforge_core import hookspecs, strategy
from specforge_core.cli import cli
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import write_conversations

SPECS = [name for name in vars(hookspecs) if name.startswith("specforge_")]

RECORDER = '''
"""Wraps every hook and writes its name to a file."""
from pathlib import Path
from specforge_core import hookimpl
LOG = Path({log!r})
'''
WRAPPER = """
@hookimpl(wrapper=True)
def {name}():
    with LOG.open("a") as file:
        file.write("{name}\\n")
    return (yield)
"""


@pytest.fixture
def calls(env: FakeSite, tmp_path: Path) -> Path:
    log = tmp_path / "calls"
    # with a section of its own it would be off
    names = [name for name in SPECS if name != "specforge_plugin_config"]
    source = RECORDER.format(log=str(log)) + "".join(WRAPPER.format(name=n) for n in names)
    group = {"specforge.plugins": {"recorder": "specforge_recorder"}}
    env.dist("specforge-recorder", "1.0", group, module="specforge_recorder", source=source)
    return log


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_a_whole_run_calls_every_hook_in_order(
    calls: Path, tmp_path: Path, toy_target: Path
) -> None:
    data = write_conversations(tmp_path / "train.jsonl", 6)
    raw = {
        "target": {"path": str(toy_target), "dtype": "float32"},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)], "capture_dir": str(tmp_path / "capture")},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 2, "log_every": 1, "device": "cpu"},
        "eval": {"prompts": {"toy": str(data)}, "limit": 2, "max_new_tokens": 4},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))

    def called() -> list[str]:
        names = [n.removeprefix("specforge_") for n in calls.read_text().splitlines()]
        calls.unlink()
        return names

    run("capture", "-c", str(config))
    assert called() == ["config", "adapter", "conversations", "target_engine", "verify_capture"]
    run("train", "-c", str(config))
    assert called() == [
        *("config", "adapter", "reader", "verify_capture", "draft", "optimizers", "schedule"),
        *("train_step", "tracker", "transform", "collate"),
    ]
    out = run("eval", "-c", str(config), "--draft", str(tmp_path / "run"), "--json")
    assert json.loads(out)["lossless"] is True
    assert called() == ["config", "draft", "adapter", "conversations", "adapter", "proposer"]
    run("export", "--checkpoint", str(tmp_path / "run"), "-o", str(tmp_path / "export"))
    assert called() == ["config", "draft", "adapter", "export"]
    out = run(
        *("doctor", "-c", str(config), "--draft", str(tmp_path / "run")),
        *("--export", str(tmp_path / "export")),
    )
    assert "no engine was measured" in out
    assert set(called()) == {
        *("config", "adapter", "target_engine", "verify_capture", "transform", "collate", "draft"),
        *("train_step", "proposer", "export", "import", "serve", "conversations"),
    }
    run("train", "-c", str(config), "data.capture_dir=null", f"output_dir={tmp_path / 'online'}")
    assert called() == [
        *("config", "adapter", "conversations", "target_engine", "verify_capture", "draft"),
        *("optimizers", "schedule", "train_step", "tracker", "transform", "collate"),
    ]


def test_the_facade_spells_every_hook_as_its_spec_does() -> None:
    for name in SPECS:
        others = {"specforge_import": "load_export", "specforge_tracker": "trackers"}
        others["specforge_plugin_config"] = "plugin_configs"
        method = others.get(name, name.removeprefix("specforge_"))
        ours = inspect.signature(getattr(strategy.Strategy, method)).parameters
        spec = inspect.signature(getattr(hookspecs, name)).parameters
        assert list(ours)[1:] == list(spec), name


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_says_what_it_is_for(name: str) -> None:
    doc = inspect.getdoc(getattr(hookspecs, name))
    assert doc is not None
    assert doc.splitlines()[0].endswith(".")
