"""`specforge train --nproc N`: the ranks of one machine, as processes of this one.

They meet through files in a private directory and talk over the loopback interface, so nothing
listens to the network.  What they end with is said here, once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from .. import stop
from ..process import LAUNCHER, PRIVATE, Report, read_report

POLL_SECONDS = 0.05
SAME_SECONDS = 1.5  # from a rank's failure on: the others may fail alike, by themselves
KILL_SECONDS = 4.0  # then they are asked to end, and by this time made to
SECOND_SECONDS = 4.0  # from a second signal on, which leaves a rank stop.SECONDS to end
OWN_SECONDS = 10.0  # which this process needs less than, so that it can say what became of them
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
# environment variables by which ranks talk within this machine only
LOCAL = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK)
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `specforge` with the same arguments as `nproc` ranks; return the exit status.

    Whatever ends this process ends them: a signal is handed on to them, and of a kill they learn
    by themselves.  One that fails ends the others.
    """
    with (
        tempfile.TemporaryDirectory(prefix="specforge-ranks-") as directory,
        stop.keeping(OWN_SECONDS),
    ):
        ranks = Ranks(Path(directory))
        try:
            for rank in range(nproc):
                ranks.start(rank, nproc, arguments)
            ranks.wait()
        finally:
            ranks.kill()
        message, status = ranks.verdict()
    if message:
        click.echo(message, err=True)
    return status


class Ranks:
    """The running ranks, and how they came to their end."""

    def __init__(self, directory: Path) -> None:
        """`directory` is where they meet and leave their last words; only the user can read it."""
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._killed: set[int] = set()  # by us
        self._alive: dict[int, float] = {}  # rank -> when it was last seen to run
        self._told = 0  # signals handed on
        self._stopped: float | None = None  # when the first was
        self._asked_to_end = False

    def start(self, rank: int, nproc: int, arguments: Sequence[str]) -> None:
        """Start one rank, in a group of its own: what a terminal sends comes through here."""
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            **LOCAL,
            "NCCL_RAS_ENABLE": "0",  # a port that answers whoever asks
            PRIVATE: str(self._directory),
            LAUNCHER: str(os.getpid()),
        }
        command = [sys.executable, "-m", "specforge_core.cli", *arguments]
        self._alive[rank] = time.monotonic()
        self._processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def wait(self) -> None:
        """Wait until all have ended; hand signals on, and end the rest when one has failed."""
        failed = second = None
        while self._running():
            now = time.monotonic()
            if stop.asked() is not None and self._told < stop.count():
                self._told = stop.count()
                self._stopped = self._stopped or now
                # whichever came: of a SIGINT a Python that only starts prints a traceback
                self._send(signal.SIGTERM)
            if self._told >= 2:
                second = second or now
            if failed is None and self._any_failed():
                failed = now
            if failed is not None and now - failed > SAME_SECONDS and not self._asked_to_end:
                self._asked_to_end = True
                self._send(signal.SIGTERM)
            late = failed is not None and now - failed > KILL_SECONDS
            if late or (second is not None and now - second > SECOND_SECONDS):
                self.kill()
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End the ranks that are left, and what they started."""
        for rank in self._running():
            self._killed.add(rank)
            with suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, signal.SIGKILL)
            self._processes[rank].wait()

    def verdict(self) -> tuple[str, int]:
        """Return what is to be said of the ranks' end, and the exit status."""
        failures = [failure for rank in range(len(self._processes)) if (failure := self._end(rank))]
        stops = [failure for failure in failures if failure.status in STOPPED]
        errors = [failure for failure in failures if failure.status not in STOPPED]
        first = min(errors, key=lambda failure: failure.time, default=None)
        signum = stop.asked()
        if first is not None and (self._stopped is None or first.time < self._stopped or not stops):
            everywhere = len({failure.message for failure in errors}) == 1
            of_rank = f" (rank {first.rank})" if first.rank and not everywhere else ""
            return f"error{of_rank}: {first.message}", first.status
        if signum is None and not stops:
            return "", 0
        status = stops[0].status if signum is None else 128 + signum
        if any(not failure.message and failure.rank == 0 for failure in stops):
            return "", status  # it has told of its checkpoint
        return str(stop.Interrupted(status - 128)), status

    def _running(self) -> list[int]:
        """Return the ranks that have not ended, and note that they were seen."""
        running = []
        for rank, process in enumerate(self._processes):
            now = time.monotonic()
            if process.poll() is None:
                self._alive[rank] = now
                running.append(rank)
        return running

    def _any_failed(self) -> bool:
        codes = [process.returncode for process in self._processes]
        if any(codes):  # neither None nor 0
            return True
        return any(read_report(self._directory, rank) for rank in range(len(codes)))

    def _send(self, signum: int) -> None:
        for rank in self._running():
            self._processes[rank].send_signal(signum)

    def _end(self, rank: int) -> Report | None:
        """Return how a rank ended, if it was neither well nor by us.

        A death that nobody told of counts from when the rank was last seen: what the others make of
        it is told later, and may be before this process looks again.
        """
        code = self._processes[rank].returncode
        if (report := read_report(self._directory, rank)) is not None:
            return report
        if code == 0 or rank in self._killed:
            return None
        if code < 0 and -code not in stop.SIGNALS:
            name = signal.Signals(-code).name
            memory = " (is there too little memory?)" if name == "SIGKILL" else ""
            message = (
                f"rank {rank} was killed by {name}{memory}. The other ranks were ended, and the "
                f"checkpoints are whole. {stop.AGAIN}"
            )
            return Report(None, message, 1, self._alive[rank])
        message = f"rank {rank} ended with status {code}"
        if code < 0:  # a signal that came before the rank listened
            message, code = str(stop.Interrupted(-code)), 128 - code
        elif code in STOPPED:
            message = ""
        return Report(rank if not message else None, message, code, self._alive[rank])
