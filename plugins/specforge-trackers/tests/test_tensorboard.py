"""Event files of real runs, read back with TensorBoard's own reader."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from specforge_trackers.tensorboard import TensorboardTracker

from specforge_core.errors import ConfigError
from specforge_core.testing.forked import SECONDS, python
from specforge_core.testing.runs import finish, lines, load, write_run
from specforge_core.train.run import train

ON = "plugins.tensorboard={}"


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    settings = {"max_steps": 4, "batch_size": 2, "save_every": 2}
    strategy = {"name": "linear"}
    return write_run(tmp_path, toy_target, conversations=8, strategy=strategy, train=settings)


def read(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Any = EventAccumulator(str(directory))
    found.Reload()
    return found


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(row.step, row.value) for row in found.Scalars(tag)]


def texts(found: Any, name: str) -> list[tuple[int, str]]:
    rows = found.Tensors(f"{name}/text_summary")
    return [(row.step, row.tensor_proto.string_val[0].decode()) for row in rows]


def test_a_run_without_the_section_writes_nothing(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_every_number_the_config_and_the_checkpoints_are_read_back(
    config: Path, tmp_path: Path
) -> None:
    train(*load(config, ON))
    found = read(tmp_path / "run" / "tensorboard")
    rows = lines(tmp_path / "run")
    assert len(rows) == 4
    names = set(rows[0]) - {"step"}
    assert set(found.Tags()["scalars"]) >= names
    for name in names:
        assert scalars(found, name) == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row
        ]
    ((step, text),) = texts(found, "config")
    assert step == 0
    assert '"max_steps": 4' in text
    assert '"strategy": "linear"' in text
    assert [step for step, _ in texts(found, "event/checkpoint")] == [2, 4]
    assert "step-00000004" in texts(found, "event/checkpoint")[1][1]
    (curves,) = found.Images("curves")
    assert (curves.step, curves.width) == (4, 980)
    assert curves.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_resumed_run_shows_every_step_once(config: Path, tmp_path: Path) -> None:
    """The run is killed at step 3, when the last checkpoint is of step 2."""
    code = (
        "import os, sys\n"
        "from specforge_core.testing.runs import load\n"
        "from specforge_core.train import trainer\n"
        "from specforge_core.train.run import train\n"
        "from specforge_trackers.tensorboard import TensorboardTracker as T\n"
        "log = T.log\n"
        "def killed(self, step, metrics):\n"
        "    log(self, step, metrics)\n"
        "    if step == 3:\n"
        "        self.writer.flush()\n"
        "        os._exit(9)\n"
        "T.log = killed\n"
        "from pathlib import Path\n"
        f"train(*load(Path(sys.argv[1]), {ON!r}))\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(code)
    killed = python(script, str(config), env=os.environ)
    killed.communicate(timeout=SECONDS)
    assert killed.returncode == 9
    directory = tmp_path / "run" / "tensorboard"
    assert [step for step, _ in scalars(read(directory), "loss")] == [1, 2, 3]
    train(*load(config, ON))
    found = read(directory)
    assert len(list(directory.iterdir())) == 2
    assert [step for step, _ in scalars(found, "loss")] == [1, 2, 3, 4]
    assert [step for step, _ in texts(found, "event/checkpoint")] == [2, 4]
    assert [step for step, _ in texts(found, "config")] == [0, 2]


@pytest.mark.slow
def test_another_directory_and_a_wrong_option(config: Path, tmp_path: Path) -> None:
    train(*load(config, f"plugins.tensorboard.directory={tmp_path / 'logs'}", "train.max_steps=1"))
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(ConfigError, match=r"plugins\.tensorboard\.direktory: unknown key, did you"):
        load(config, "plugins.tensorboard.direktory=x")
    with pytest.raises(
        ConfigError, match=r"plugins\.tensorboard\.flush_seconds: .* greater than 0"
    ):
        load(config, "plugins.tensorboard.flush_seconds=0")


def test_a_directory_that_cannot_be_written_ends_no_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    report = train(*load(config, f"plugins.tensorboard.directory={tmp_path / 'file'}"))
    assert report.step == 4
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("warning: the tracker of specforge-trackers") == 1


def test_a_run_without_it_does_not_import_tensorboard(config: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom specforge_core.testing.runs import load\n"
        f"load(Path({str(config)!r}))\n"
        "print('tensorboard' in sys.modules)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    assert finish(python(script, env=os.environ)) == "False\n"


def test_a_start_in_the_same_second_writes_a_file_that_is_read_after_the_others(
    tmp_path: Path,
) -> None:
    (tmp_path / f"events.out.tfevents.{int(time.time())}.zzz.999999.9").touch()
    tracker = TensorboardTracker(tmp_path, 1.0)
    about = dict.fromkeys(("strategy", "target", "versions", "config"), "x")
    about["output_dir"] = str(tmp_path)
    tracker.start({"step": 2, **about})
    tracker.close()
    assert "zzz" in min(path.name for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
