"""A run whose data grows, and what is compared of two such."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specforge_core.data.promptset import Joined
from specforge_core.drafts.checkpoint import find, read_state
from specforge_core.testing.runs import lines, load
from specforge_core.train.report import Launched
from specforge_core.train.run import train
from specforge_core.train.trainer import Trainer

# 20 rows are 5 steps; 3 + 3 + 3 + 1 prompts are answered from steps 2, 4, 6 and 8 on
GROWS = (
    "train.regenerate_every=2",
    "train.regenerate_prompts=3",
    "train.max_steps=16",
    "train.schedule=constant",  # the first steps of a shorter run are the same
    "train.warmup_ratio=0",
    "regenerate.max_new_tokens=6",
    "regenerate.keep_unfinished=true",
    "regenerate.temperature=1",
    "regenerate.batch_size=2",
)
EPOCHS = (5, 12)  # the last step of the first one, of 20 rows, and of the second, of 26

# a run that goes on to a step, and no further
HELD = """
    import os, time
    from specforge_core import hookimpl
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_train_step)

    class Held:
        def start(self, info): ...

        def log(self, step, metrics):
            if step == int(os.environ["HELD_AT"]):
                time.sleep(600)

        def event(self, name, values): ...

        def close(self): ...

    @hookimpl
    def specforge_tracker(run):
        return Held()
"""


@dataclass
class Whole:
    """A run that nothing disturbed."""

    out: Path
    seen: list[list[int]]  # the samples trained on in each epoch
    prompts: Joined  # of the last one
    said: str


def watched(config: Path) -> Whole:
    """Train a run that nothing disturbs."""
    seen: list[list[int]] = [[]]
    prompts: list[Joined] = []
    step, said = Trainer._optimizer_step, StringIO()

    def watching(self: Trainer, *arguments: Any) -> Launched | None:
        launched = step(self, *arguments)
        assert launched is not None
        assert self.growth is not None
        seen[-1].extend(launched.indices)
        prompts[:] = [self.growth.prompts]
        if launched.step in EPOCHS:
            seen.append([])
        return launched

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(Trainer, "_optimizer_step", watching)
        assert train(*load(config, *GROWS, "train.save_every=100")).step == 16
    return Whole(config.parent / "run", seen, prompts[0], " ".join(said.getvalue().split()))


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted(find(output_dir).glob("*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


def answers(output_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output_dir / "regenerated").iterdir()}


def trained(output_dir: Path) -> list[dict[str, float]]:
    """Return what was logged of each step, but times."""
    names = ("step", "loss", "grad_norm", "tokens", "learning_rate")
    return [{name: row[name] for name in names} for row in lines(output_dir)]


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trained(one) == trained(other)
    assert read_state(find(one)).grown == read_state(find(other)).grown
    return answers(one) == answers(other)
