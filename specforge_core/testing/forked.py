"""`specforge` in processes that a server forks: real ones, to send signals to, without the imports.

A process that starts Python imports torch and transformers for 5 to 8 s before it does anything.
The server has done so once; what it forks is a process of its own like any other, and so are the
ranks that such a process launches.  What is about the start itself needs `runs.cli`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn
from unittest.mock import patch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "specforge_core.train.run",
        "specforge_core.capture.job",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.fsdp",
        __name__,
    ]
)
SECONDS = 240  # of a process that ends by itself
_running: set[BaseProcess] = set()
# what a command sets before it imports, and a fork finds imported
_BEFORE = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def begin() -> None:
    """Start the server, if it does not run, as a command starts."""
    with patch.dict(os.environ, _BEFORE):
        forkserver.ensure_running()


class Forked:
    """One such process, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        directory: Path | None = None,
        script: Path | None = None,
    ) -> None:
        self._said: tuple[str, str] | None = None
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        work = (list(arguments), dict(environment), str(directory or Path.cwd()), names, script)
        begin()
        self._process = SERVER.Process(target=_work, args=work)
        self._process.start()
        _running.add(self._process)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that killed it, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status when it has ended; raises TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("specforge", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and to stderr."""
        self.wait(timeout)
        if self._said is None:
            _running.discard(self._process)
            out, err = (Path(file.name).read_text(encoding="utf-8") for file in self._files)
            self._said = out, err
            for file in self._files:
                file.close()
        return self._said

    def send_signal(self, signum: int) -> None:
        """Send it a signal, if it runs."""
        if self.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send it SIGKILL, if it runs."""
        self._process.kill()


def cli(*arguments: str, env: Mapping[str, str] | None = None) -> Forked:
    """Start `specforge` with arguments, as `runs.cli` does, in a fork of the server."""
    return Forked(arguments, os.environ if env is None else env)


def python(script: Path, *arguments: str, env: Mapping[str, str]) -> Forked:
    """Start what `python SCRIPT ARGUMENTS...` does in a fork of the server."""
    return Forked(arguments, env, script=script)


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    script: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `specforge`, or a script, with arguments to its end, in a fork, in the folder `cwd`."""
    process = Forked(arguments, os.environ if env is None else env, cwd, script)
    out, err = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(list(arguments), process.wait(), out, err)


class _Rank:
    """A rank of a forked launcher, forked too: `subprocess.Popen`, as `train.launch` uses it."""

    def __init__(self, command: list[str], env: dict[str, str], start_new_session: bool) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            with open("/proc/self/comm", "w") as name:  # noqa: PTH123
                name.write(f"rank {env['RANK']}")  # /proc shows no environment set since the start
            _be(command[command.index("specforge_core.cli") + 1 :], env)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        return self._reap(0)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, options)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _work(
    arguments: list[str],
    environment: dict[str, str],
    directory: str,
    outputs: list[str],
    script: Path | None,
) -> NoReturn:
    """In the fork of the server: be the command."""
    from ..train import launch

    os.chdir(directory)
    for number, name in enumerate(outputs, start=1):
        with Path(name).open("ab") as file:
            os.dup2(file.fileno(), number)
    vars(launch)["subprocess"] = SimpleNamespace(Popen=_Rank)
    # what it starts in its turn is forked by the same server: Python would start one more
    runs = vars(forkserver)["ensure_running"] = lambda: None
    vars(forkserver)["_forkserver"].ensure_running = runs
    _be(arguments, environment, script)


def _be(
    arguments: Sequence[str], environment: Mapping[str, str], script: Path | None = None
) -> NoReturn:
    """Be `specforge` with these arguments, or a script, and end as it does."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        added = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [place for place in added if place and place not in sys.path]
        sys.argv = [str(script or "specforge"), *arguments]
        if script is not None:
            runpy.run_path(str(script), run_name="__main__")
        else:
            from ..cli import main

            main()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@atexit.register
def _end() -> None:
    """Leave no process behind that a failed test did not wait for."""
    for process in _running:
        process.kill()
