"""Weights & Biases, online or offline: a run of theirs for each output directory."""

from __future__ import annotations

import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from specforge_core import hookimpl
from specforge_core.config import RunConfig, Section
from specforge_core.files import make_folder, write_file
from specforge_core.types import Tracker

from .common import about, as_text, need, picture

NAME = "wandb"
ID = "specforge-run-id"  # in OUTPUT_DIR/wandb
LOGIN_SECONDS = 30  # that a question for a key on the terminal is waited for
STEP = "step"


class WandbConfig(Section):
    """Runs in Weights & Biases.  Its key is in WANDB_API_KEY, or where `wandb login` put it."""

    project: str = Field("specforge", min_length=1, description="The project.")
    entity: str | None = Field(None, description="User or team; none: the key's own.")
    name: str | None = Field(None, description="The run's name; none: that of OUTPUT_DIR.")
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="offline writes to OUTPUT_DIR/wandb, for `wandb sync`; none: as WANDB_MODE "
        "says, else online.",
    )


class WandbTracker:
    """Goes on with the same run where training does."""

    def __init__(self, output_dir: Path, options: WandbConfig) -> None:
        self.output_dir, self.options = output_dir, options
        self.run: Any = None  # opened by `start`
        self.step = 0

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the run, or go on with it."""
        import wandb

        self.step = int(info["step"])
        options = self.options
        make_folder(self.output_dir / "wandb")
        self.run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or self.output_dir.resolve().name,
            id=self._id(),
            resume="allow",
            mode=options.mode,
            dir=str(self.output_dir),
            config=about(info),
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, login_timeout=LOGIN_SECONDS
            ),
        )
        # by our own step: theirs only grows, and an evaluation of an earlier step may come late
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        self.step = step
        self.run.log({**metrics, STEP: step})

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Add what happened at its step; what has a path becomes an artifact that leads there."""
        import wandb

        self.run.log({f"event/{name}": as_text(values), STEP: int(values.get("step", self.step))})
        if (path := values.get("path")) is not None:
            artifact = wandb.Artifact(f"{name}-{self.run.id}", type=name, metadata=dict(values))
            artifact.add_reference(Path(str(path)).resolve().as_uri(), checksum=False)
            self.run.log_artifact(artifact)

    def close(self) -> None:
        """Add the picture of the run's curves, and write what is left."""
        if self.run is None:
            return
        import wandb

        try:
            if (png := picture(self.output_dir)) is not None:
                self.run.log({"curves": wandb.Image(_open(png)), STEP: self.step})
        finally:
            self.run.finish()

    def _id(self) -> str:
        """Return the id of the run that goes on, or a new one for what begins."""
        path = self.output_dir / "wandb" / ID
        if self.step == 0 or not path.is_file():
            write_file(path, secrets.token_hex(4).encode())
        return path.read_text(encoding="utf-8").strip()


def _open(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


@hookimpl
def specforge_plugin_config() -> type[WandbConfig]:
    """Return the section `plugins.wandb`."""
    return WandbConfig


@hookimpl
def specforge_tracker(run: RunConfig) -> Tracker:
    """Return the tracker of a run that has the section."""
    options = run.plugins[NAME]
    assert isinstance(options, WandbConfig)
    need(NAME)
    return WandbTracker(run.output_dir, options)
