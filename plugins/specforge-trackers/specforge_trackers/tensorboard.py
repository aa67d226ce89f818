"""TensorBoard: every number a scalar, config and events as text, the curves as a picture."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from specforge_core import hookimpl
from specforge_core.config import RunConfig, Section
from specforge_core.types import Tracker

from .common import about, as_text, picture

NAME = "tensorboard"


class TensorboardConfig(Section):
    """Event files for TensorBoard."""

    directory: Path | None = Field(
        None, description="Where the event files go; none: OUTPUT_DIR/tensorboard."
    )
    flush_seconds: float = Field(
        30.0, gt=0, le=1e6, description="Seconds until a number is on disk."
    )


class TensorboardTracker:
    """Writes one event file per start of a run."""

    def __init__(self, directory: Path, flush_seconds: float) -> None:
        self.directory = directory
        self.flush_seconds = flush_seconds
        self.writer: Any = None  # opened by `start`
        self.output_dir: Path | None = None
        self.step = 0

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the file; what an earlier start wrote after this step is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self.step = step = int(info["step"])
        self.output_dir = Path(info["output_dir"])
        _wait_for_a_later_name(self.directory)
        self.writer = SummaryWriter(
            str(self.directory), purge_step=step + 1, flush_secs=self.flush_seconds
        )
        self._text("config", about(info), step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add each number as a scalar."""
        self.step = step
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Add what happened as text, at its step."""
        self._text(f"event/{name}", values, int(values.get("step", 0)))

    def close(self) -> None:
        """Add the picture of the run's curves, and write what is left."""
        if self.writer is None or self.output_dir is None:
            return
        self.writer.flush()  # before what takes long: a signal leaves seconds
        try:
            if (png := picture(self.output_dir)) is not None:
                from matplotlib.image import imread

                self.writer.add_image(
                    "curves", imread(io.BytesIO(png)), self.step, dataformats="HWC"
                )
        finally:
            self.writer.close()

    def _text(self, name: str, values: Mapping[str, Any], step: int) -> None:
        shown = as_text(values)
        # Markdown shows a line that begins with four spaces as it is
        self.writer.add_text(name, "\n".join(f"    {line}" for line in shown.splitlines()), step)


def _wait_for_a_later_name(directory: Path) -> None:
    """Wait, a second at most, until a new file's name sorts behind those that are there.

    TensorBoard reads them in the order of their names, which begin with the second.
    """
    names = [path.name.split(".") for path in directory.glob("events.out.tfevents.*")]
    seconds = [int(parts[3]) for parts in names if parts[3].isdecimal()]
    time.sleep(min(1.0, max(0.0, max(seconds, default=0) + 1 - time.time())))


@hookimpl
def specforge_plugin_config() -> type[TensorboardConfig]:
    """Return the section `plugins.tensorboard`."""
    return TensorboardConfig


@hookimpl
def specforge_tracker(run: RunConfig) -> Tracker:
    """Return the tracker of a run that has the section."""
    options = run.plugins[NAME]
    assert isinstance(options, TensorboardConfig)
    return TensorboardTracker(
        options.directory or run.output_dir / "tensorboard", options.flush_seconds
    )
