"""What a user sees: exit status, one message, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.toy import write_conversations


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    data = write_conversations(tmp_path / "train.jsonl", 8)
    raw: dict[str, Any] = {
        "target": {"path": str(toy_target)},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)]},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 2, "device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def fails(*arguments: str, status: int = 2, **kwargs: Any) -> str:
    done = run(*arguments, **kwargs)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_wrong_config_ends_with_one_message_and_status_2(config: Path, tmp_path: Path) -> None:
    err = fails("train", "-c", str(config), "train.lerning_rate=1")
    assert err.startswith("error: ")
    assert "train.lerning_rate: unknown key, did you mean 'learning_rate'?" in err
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_where_nobody_expected_it_is_one_message(tmp_path: Path) -> None:
    code = (
        "import sys; from specforge_core import cli, listing\n"
        "import errno, os\n"
        "def no_room(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'some.file')\n"
        "listing.list_options = no_room\n"
        "sys.argv = ['specforge', 'config']; cli.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: some.file cannot be written: No space left on device (")
    assert done.stderr.endswith("then run the same command again\n")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_where_an_error_came_from(config: Path) -> None:
    done = run("train", "-c", str(config), "nonsense=1", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing option '-c'"),
        (["data", "-c", "a.yaml", "--show", "1", "--json"], "--json prints the numbers alone."),
        (["train", "-c", "absent.yaml"], "config file 'absent.yaml' cannot be read"),
        (["trian"], "No such command 'trian'"),
        (["check", "absent"], "strategy 'absent' is not installed"),
        (["check", "lineer"], "did you mean 'linear'? Try: specforge check linear"),
        (["check", "linear", "--deep", "strategy.layer=x"], "strategy.layer: Input should be a"),
        (["verify", "capture", "train.max_steps=5"], "changes a config, and there is none"),
        (["verify", "absent"], "absent does not exist. Try: specforge verify DIR"),
        (["verify", "."], ". is no capture, run, checkpoint or export: none of manifest.json"),
        (["verify", "/dev/null"], "/dev/null is a file. Try: specforge verify DIR"),
        (["export", "--checkpoint", "absent", "-o", "out"], "absent holds no complete checkpoint"),
        (
            ["export", "--checkpoint", "/dev/null", "-o", "out"],
            "/dev/null is a file. Try the folder",
        ),
        (["verify", "absent", "--recapture", "-5"], "-5 is not in the range x>=0"),
        (["train", "-c", "absent.yaml", "--nproc", "-3"], "-3 is not in the range 1<=x<=1024"),
        (["train", "-c", "absent.yaml", "--nproc", "0"], "0 is not in the range 1<=x<=1024"),
        (["train", "-c", "absent.yaml", "--nproc", "99999"], "99999 is not in the range"),
        (["check", "x" * 100_000], "xxx...xxx"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in fails(*arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_strategies_as_json_lists_a_broken_one_too(env: FakeSite) -> None:
    env.dist("specforge-gone", "1.0", {"specforge.strategies": {"gone": "specforge_gone"}})
    done = run("strategies", "--json", env=os.environ | {"PYTHONPATH": str(env.path)})
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["linear"]["state"] == "ok"
    assert rows["gone"]["state"].startswith("broken: there is no module 'specforge_gone'")


# a write past this fails as it does on a full disk
LIMITED = """
import resource
from specforge_core.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    config: Path, tmp_path: Path, ranks: str
) -> None:
    command = ("train", "-c", str(config), "--nproc", ranks)
    assert run(*command, "train.max_steps=1").returncode == 0
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    err = fails(*command, "train.max_steps=2", script=script, status=1)
    assert err.count("step-00000002 cannot be written") == 1
    assert err.count("error") == 1
    assert "start the same command again" in err
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000001"]
    assert run(*command, "train.max_steps=2").returncode == 0


@pytest.mark.slow
def test_a_run_evaluates_and_exports_from_the_command_line(config: Path, tmp_path: Path) -> None:
    assert run("train", "-c", str(config)).returncode == 0
    data = tmp_path / "train.jsonl"
    options = (f"eval.prompts={{toy: {data}}}", "eval.limit=2", "eval.max_new_tokens=8")
    done = run("eval", "-c", str(config), "--draft", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stderr
    assert "accepted by position" in done.stdout
    assert "2 of 2 greedy answers equal the target's own" in done.stdout
    report = json.loads((tmp_path / "run/eval/report.json").read_text())
    assert report["draft"] == str(tmp_path / "run")
    out = tmp_path / "export"
    arguments = ("export", "--checkpoint", str(tmp_path / "run"), "-o", str(out))
    assert run(*arguments).returncode == 0
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors"}
    assert "--force" in fails(*arguments)
    assert "cannot export to format 'warp'" in fails(
        "export", "--checkpoint", str(tmp_path / "run"), "--format", "warp", "-o", str(out) + "2"
    )
