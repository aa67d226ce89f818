"""A training run of the linear example on a toy target."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from specforge_core.drafts.checkpoint import find
from specforge_core.testing.runs import write_run


def linear_run(directory: Path, target: Path) -> Path:
    """Write the config of a run of 6 steps over 20 ragged conversations, in float32."""
    return write_run(
        directory,
        target,
        conversations=20,
        target={"batch_tokens": 256},
        strategy={"name": "linear"},
        train={
            "max_steps": 6,
            "batch_size": 2,
            "accumulate": 2,
            "learning_rate": 0.05,
            "save_every": 3,
        },
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint of a run, or of a checkpoint, by name."""
    files = sorted(find(run).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# a method whose head is wider than the linear one's
WIDE = """
    from specforge_core import hookimpl
    from specforge_core.types import Draft
    from specforge_linear import (
        Head, specforge_adapter, specforge_config, specforge_train_step)
    @hookimpl
    def specforge_draft(target):
        return Draft(model=Head(target.hidden_size, target.vocab_size + 1))
    """
