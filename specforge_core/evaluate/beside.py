"""Acceptance of a run's checkpoints, in a process of its own while the training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ..config import RunConfig
from ..errors import RunError
from ..files import refusing
from ..process import LAUNCHER, PRIVATE
from .run import make_directory

MODULE = "specforge_core.evaluate.detached"
# of a rank, which the process is none of
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", PRIVATE)
LINE = 300  # characters of its last words


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the evaluation of one step."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str = ""  # why nothing is known of the acceptance

    @classmethod
    def too_long(cls, step: int, seconds: float) -> Outcome:
        """Return that of an evaluation which was given up: its time is logged, so that it was."""
        told = f"it took longer than train.eval_seconds={seconds:g}"
        return cls(step, {"eval/seconds": seconds}, told)


@dataclass(slots=True)
class Beside:
    """At most one evaluation at a time; it ends with this process, however that ends.

    Its report is OUTPUT_DIR/eval/step-NNNNNNNN.json, what it says the .log beside it.
    """

    run: RunConfig
    device: str
    seconds: float  # that one may take
    step: int | None = None  # of the checkpoint that is read
    _process: subprocess.Popen[bytes] | None = None
    _since: float = 0.0

    def start(self, step: int, checkpoint: Path) -> None:
        """Begin with a checkpoint.  Raises RunError where nothing can be written or started."""
        report = self._report(step)
        make_directory(report.parent)
        report.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in RANK}
        environment[LAUNCHER] = str(os.getpid())
        command = [sys.executable, "-m", MODULE, str(checkpoint), str(report)]
        with (
            refusing(RunError, "Make room there, then start the same command again"),
            report.with_suffix(".log").open("wb") as log,
        ):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.step, self._since = step, time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # its log says why
            pipe.write(json.dumps(as_given(self.run, self.device), default=_plain).encode())

    def poll(self, wait: float = 0.0) -> Outcome | None:
        """Return what became of the evaluation, once it has ended; wait for that at most so long.

        One that takes longer than it may is ended.
        """
        if self._process is None or self.step is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, min(wait, self._since + self.seconds - time.monotonic())))
        step, status, report = self.step, self._process.poll(), self._report(self.step)
        if status is None and time.monotonic() < self._since + self.seconds:
            return None
        self.close()
        if status is None:
            return Outcome.too_long(step, self.seconds)
        try:
            found = json.loads(report.read_bytes())["metrics"]
            return Outcome(step, {str(name): float(value) for name, value in found.items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            log = report.with_suffix(".log")
            return Outcome(step, failure=f"its process ended with {_status(status)}: {_last(log)}")

    def close(self) -> None:
        """End the process, if there is one.  What it writes appears whole or not at all."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self.step = None

    def _report(self, step: int) -> Path:
        return self.run.output_dir / "eval" / f"step-{step:08d}.json"


def as_given(run: RunConfig, device: str) -> dict[str, Any]:
    """Return what was set in a run's config, as its evaluation on a device is to read it."""
    raw = run.model_dump(exclude_unset=True)
    raw.pop("train", None)  # which measures nothing there
    raw.get("data", {}).pop("validation", None)
    raw["eval"] = {**raw.get("eval", {}), "device": device, "compare": False}
    return raw


def _plain(value: object) -> Any:
    """Return a secret as it is: what reads it is our own process, through a pipe."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value.value if isinstance(value, Enum) else str(value)


def _status(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def _last(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1][-LINE:]} ({log})" if lines else f"{log} is empty"
