"""Runs that go on under another number of ranks, batch size or accumulation."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specforge_core.capture.job import run_capture
from specforge_core.drafts import checkpoint
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import SECONDS, lines, load

from ..runs import linear_run

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


COUNTING = """
    import os, signal
    import torch.distributed as dist
    from specforge_core import hookimpl
    import specforge_linear
    from specforge_linear import specforge_adapter, specforge_config, specforge_draft

    asked = []

    @hookimpl
    def specforge_train_step():
        def step(draft, batch, ctx):
            out = specforge_linear.train_step(draft, batch, ctx)
            ids, documents = batch["input_ids"][0], batch["document_ids"][0]
            with open(f"{os.environ['SEEN']}/{ctx.step:03d}-{dist.get_rank()}", "a") as file:
                for number in documents.unique().tolist():
                    if number:
                        file.write(f"{ids[documents == number].tolist()}\\n")
            if ctx.step + 1 == int(os.environ["STOP"]) and dist.get_rank() == 0 and not asked:
                asked.append(True)  # once: a second signal would not wait for the step's end
                os.kill(os.getpid(), signal.SIGTERM)
            return out
        return step
    """

# (ranks, batch_size, accumulate, stopped after this step): 2 epochs of 20 samples
ELASTIC = [
    [(1, 2, 1, 3), (2, 1, 2, 6), (3, 2, 1, 8), (1, 3, 1, 0)],  # 6 + 12 + 12 + 3 * 3 + 1 samples
    [(2, 2, 1, 2), (3, 1, 1, 6), (2, 3, 1, 0)],  # 8 + 12 + 3 * 6 + 2 samples
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ELASTIC)
@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_a_run_resumed_under_other_numbers_of_ranks_sees_every_sample_once_an_epoch(
    config: Path, tmp_path: Path, env: Any, plan: list[tuple[int, int, int, int]], offline: bool
) -> None:
    env.strategy("counting", COUNTING)
    seen = tmp_path / "seen"
    seen.mkdir()
    common = ["strategy.name=counting", "train.save_every=100", "train.warmup_ratio=0"]
    common += ["train.epochs=2", "train.max_steps=null"]
    if offline:
        common.append(f"data.capture_dir={tmp_path / 'capture'}")
        run_capture(*load(config, *common[1:], "strategy.name=linear"))
    position, want, done = 0, [], 0
    for ranks, size, accumulate, stop in plan:
        environment = os.environ | {"PYTHONPATH": str(env.path), "SEEN": str(seen)}
        environment["STOP"] = str(stop)
        options = (*common, f"train.batch_size={size}", f"train.accumulate={accumulate}")
        command = ("train", "-c", str(config), "--nproc", str(ranks), *options)
        process = cli(*command, env=environment)
        told = "".join(process.communicate(timeout=SECONDS))
        assert process.returncode == (143 if stop else 0), told
        per_step = ranks * size * accumulate
        while position < 40 and done != (stop or None):
            # a cosine over the samples, whatever a step is
            progress = min(position / (40 - per_step), 1.0)
            want.append(0.05 * 0.5 * (1 + math.cos(math.pi * progress)))
            position, done = min(position + per_step, 40), done + 1
        assert ("finished" if position == 40 else "stopped") + f" at step {done}/" in told
    assert position == 40
    assert checkpoint.read_state(checkpoint.find(tmp_path / "run")).position == 40
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, done + 1))
    assert [row["learning_rate"] for row in rows] == pytest.approx(want)
    counts = Counter(line for file in seen.iterdir() for line in file.read_text().splitlines())
    assert len(counts) == 20
    assert set(counts.values()) == {2}
