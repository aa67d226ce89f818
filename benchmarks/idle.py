"""How long GPUs had no kernel to run, by what nvidia-smi says of them five times a second."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from statistics import mean
from types import TracebackType

ASKED = ("--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200")


class Idle:
    """Looks at the GPUs for the length of a `with`; at none where there is no nvidia-smi."""

    def __init__(self, gpus: int) -> None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        first = named if all(name.isdecimal() for name in named) else range(gpus)
        self.gpus, self.since = {int(index) for index in [*first][:gpus]}, 0
        self.told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by __exit__
        found = shutil.which("nvidia-smi")
        self.process = found and subprocess.Popen([found, *ASKED], stdout=self.told)

    def __enter__(self) -> Idle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.told.close()

    def begin(self) -> None:
        """Leave out what was before."""
        self.since = len(self._lines())

    def share(self) -> float | None:
        """Return the part of the time, mean over the GPUs; None where nothing is known."""
        return idle_share(self._lines()[self.since :], self.gpus)

    def _lines(self) -> list[str]:
        self.told.seek(0)
        text = self.told.read()
        return text[: text.rfind("\n") + 1].splitlines()


def idle_share(lines: list[str], gpus: set[int]) -> float | None:
    """Return 1 - the mean use of some GPUs, of lines `index, percent`."""
    pairs = (line.split(",") for line in lines)
    used = [int(percent) for index, percent in pairs if int(index) in gpus and "[" not in percent]
    return 1 - mean(used) / 100 if used else None
