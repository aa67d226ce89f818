"""A training run of the linear example on a toy target."""

from __future__ import annotations

from pathlib import Path

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
