"""Two signals in quick succession, wherever a command is, and what is there afterwards."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specforge_core.capture.verify import verify_directory
from specforge_core.drafts.checkpoint import checkpoints
from specforge_core.drafts.verify import verify_draft
from specforge_core.files import TEMPORARY
from specforge_core.testing import runs
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, lines

from ..processes import end, wait
from ..runs import linear_run
from .started import left_nothing

pytest.importorskip("specforge_linear", reason="the linear example is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
# whatever of a checkpoint is written last takes a minute, if it is of the sixth step
SLOW_SAVE = """
    import os, time
    from pathlib import Path
    from specforge_core.train import checkpoint
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_train_step)

    write = checkpoint.write_file

    def slow(path, *arguments, **options):
        if "step-00000006" in str(path) and "SAVING" in os.environ:
            Path(os.environ["SAVING"]).touch()
            time.sleep(60)
        return write(path, *arguments, **options)

    checkpoint.write_file = slow
    """


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_a_save_they_leave_the_checkpoint_before_it(
    config: Path, tmp_path: Path, env: Any, ranks: int
) -> None:
    env.strategy("slow", SLOW_SAVE)
    command = ("train", "-c", str(config), "--nproc", str(ranks), "strategy.name=slow")
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    saving = tmp_path / "saving"
    process = cli(*command, env=environment | {"SAVING": str(saving)})
    wait(process, saving.exists)
    status, out, err = end(process, signal.SIGTERM, signal.SIGTERM)
    assert (status, out) == (143, "")
    assert err.splitlines()[-1].startswith("stopped by SIGTERM: ")
    assert err.count("stopped by") == 1
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run)] == ["step-00000003"]
    assert str(verify_draft(run)).endswith("as they were written")
    assert "finished at step 6/6" in finish(cli(*command, env=environment))
    assert [row["step"] for row in lines(run)] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]


def listens(process: int) -> bool:
    """Say whether a process has a handler of SIGTERM."""
    status = Path(f"/proc/{process}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(status, 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("later", [0.0, 1.0])
def test_while_it_imports_they_end_it(
    config: Path, tmp_path: Path, ranks: int, later: float
) -> None:
    process = runs.cli("train", "-c", str(config), "--nproc", str(ranks))
    wait(process, lambda: listens(process.pid))
    time.sleep(later)
    began = time.monotonic()
    status, out, err = end(process, signal.SIGTERM, signal.SIGTERM, apart=0.15)
    # the second may come when Python has given its handlers up: shells see 143 then, too
    assert status in (143, -signal.SIGTERM)
    assert out == ""
    assert err.count("stopped by SIGTERM: nothing that was finished is lost") == 1
    assert len(err.splitlines()) <= 2  # and on what it trains
    assert left_nothing(tmp_path / "run", began)


# once some shards or answers are there, the next one takes a minute
SLOW_WORK = """
    import os, time
    from pathlib import Path
    from specforge_core.capture import writer
    from specforge_core.target.engine import TransformersEngine
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_train_step)

    def busy():
        if "BUSY" in os.environ:
            Path(os.environ["BUSY"]).touch()
            time.sleep(60)

    write, answers = writer.write_shard, TransformersEngine.generate

    def slow_shard(path, *arguments):
        if "00002" in path.name:
            busy()
        return write(path, *arguments)

    def slow_answers(*arguments):
        for number, answer in enumerate(answers(*arguments)):
            yield answer
            if number == 1:
                busy()

    writer.write_shard, TransformersEngine.generate = slow_shard, slow_answers
    """


@pytest.mark.parametrize("apart", [0.0, 0.2])
@pytest.mark.parametrize("what", ["capture", "regenerate"])
def test_in_other_commands_they_leave_what_was_finished(
    config: Path, tmp_path: Path, env: Any, what: str, apart: float
) -> None:
    env.strategy("slow", SLOW_WORK)
    environment = os.environ | {"PYTHONPATH": str(env.path)}
    busy, capture, answers = (tmp_path / name for name in ("busy", "capture", "answers.jsonl"))
    options = ["strategy.name=slow", f"regenerate.prompts=[{tmp_path / 'train.jsonl'}]"]
    options += ["regenerate.max_new_tokens=2", "regenerate.keep_unfinished=true"]
    options += [f"data.capture_dir={capture}", "capture.shard_tokens=200", "data.limit=12"]
    to = ["-o", str(answers)] if what == "regenerate" else []
    command = (what, "-c", str(config), *to, *options)
    process = cli(*command, env=environment | {"BUSY": str(busy)})
    wait(process, busy.exists)
    status, out, err = end(process, signal.SIGINT, signal.SIGTERM, apart=apart)
    # a kernel keeps no order of signals that are sent at the same moment
    first = signal.SIGINT if apart or status == 130 else signal.SIGTERM
    assert (status, out) == (128 + first, "")
    assert err.startswith(f"stopped by {first.name}: ")
    assert err.endswith(". Start the same command again to go on\n")
    assert err.count("\n") == 1
    finish(cli(*command, env=environment))
    if what == "regenerate":
        rows = [json.loads(line) for line in answers.read_text("utf-8").rstrip("\n").split("\n")]
        assert len({row["id"] for row in rows}) == len(rows) == 12
    else:
        assert "12 samples are as they should be" in str(verify_directory(capture, None, None, 0))
    assert not [path for path in tmp_path.rglob("*") if TEMPORARY.fullmatch(path.name)]
