"""Trackio: a local database, shown by `trackio show`."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import Field

from specforge_core import hookimpl
from specforge_core.config import RunConfig, Section
from specforge_core.types import Tracker

from .common import about, as_text, need, picture

NAME = "trackio"


class TrackioConfig(Section):
    """Runs in Trackio's database, which lies where TRACKIO_DIR says."""

    project: str = Field("specforge", min_length=1, description="The project.")
    name: str | None = Field(None, description="The run's name; none: that of OUTPUT_DIR.")


class TrackioTracker:
    """Goes on with the newest run of its name where training does."""

    def __init__(self, output_dir: Path, options: TrackioConfig) -> None:
        self.output_dir, self.options = output_dir, options
        self.run: Any = None  # opened by `start`
        self.step = 0

    def start(self, info: Mapping[str, Any]) -> None:
        """Open the run, or go on with it."""
        self.step = int(info["step"])
        with redirect_stdout(io.StringIO()):  # a command's output is its own
            import trackio

            self.run = trackio.init(
                project=self.options.project,
                name=self.options.name or self.output_dir.resolve().name,
                config=about(info),
                resume="allow" if self.step else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a step."""
        self.step = step
        self.run.log(dict(metrics), step=step)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Add what happened as text, at its step."""
        self.run.log({f"event/{name}": as_text(values)}, step=int(values.get("step", self.step)))

    def close(self) -> None:
        """Add the picture of the run's curves, and write what is left."""
        if self.run is None:
            return
        import trackio

        try:
            if (png := picture(self.output_dir)) is not None:
                with tempfile.NamedTemporaryFile(suffix=".png") as file:
                    file.write(png)
                    file.flush()
                    self.run.log({"curves": trackio.Image(file.name)}, step=self.step)
        finally:
            with redirect_stdout(io.StringIO()):
                trackio.finish()


@hookimpl
def specforge_plugin_config() -> type[TrackioConfig]:
    """Return the section `plugins.trackio`."""
    return TrackioConfig


@hookimpl
def specforge_tracker(run: RunConfig) -> Tracker:
    """Return the tracker of a run that has the section."""
    options = run.plugins[NAME]
    assert isinstance(options, TrackioConfig)
    need(NAME)
    return TrackioTracker(run.output_dir, options)
