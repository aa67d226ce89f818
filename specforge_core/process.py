"""How the process of a command begins and ends: its signals, its one message, its status.

Ranks that our own launcher started say nothing of their end: they write it into the launcher's
private directory, and it prints one message for all.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from . import stop
from .errors import LONGEST, SpecForgeError
from .files import CANNOT_WRITE, cannot_write, remedied, write_file
from .text import cut, harmless, said

PRIVATE = "SPECFORGE_PRIVATE"  # our own launcher's directory, in the environment of its ranks
LAUNCHER = "SPECFORGE_LAUNCHER"  # its process id
_began: float | None = None  # time.monotonic(); None where this process runs no command


@dataclass(frozen=True, slots=True)
class Report:
    """How a rank ended, other than well."""

    rank: int | None  # None where the message names it
    message: str
    status: int
    time: float  # time.monotonic(), which the processes of a machine share


def run(command: click.Command) -> None:
    """Run a command with this process's arguments and end the process with its status."""
    global _began
    _began = time.monotonic()
    status = 1
    atexit.register(lambda: _skip_teardown(status))  # the first one registered is called last
    try:
        stop.listen(_say_stopped, _launcher())
        status = _run(command)
    except stop.Interrupted as exc:  # it came before the command, or in what was said of it
        status = exc.status
        stop.tell(exc)
    _tidy()
    sys.exit(status)


def command_seconds() -> float | None:
    """Return for how long this process's command runs; None where it is no command's."""
    return None if _began is None else time.monotonic() - _began


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage in this block, nor ever again among what it has made.

    A fifth of the time that torch and transformers take to import goes into looks through the half
    a million objects that they make, which stay.  Nothing changes where this process is no command.
    """
    if _began is None or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _run(command: click.Command) -> int:
    """Run the command; turn errors into one message and an exit status."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not sys.stderr.isatty():  # in a log the libraries' bars are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # before torch loads OpenMP: a pool that waits must not spin on the other one's cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        asked: object = command.main(args=arguments, prog_name="specforge", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except BaseException as exc:
        stop.leaving()
        return _failed(exc, debug, _is_own(command, arguments))
    stop.leaving()
    return asked if isinstance(asked, int) else 0  # of ctx.exit(STATUS), which main() returns


def _is_own(command: click.Command, arguments: list[str]) -> bool:
    """Say whether a command is the core's own, and no package's."""
    return isinstance(command, click.Group) and command.commands.keys() >= {*arguments[:1]}


def _failed(exc: BaseException, debug: bool, own: bool) -> int:
    """Say what ended the command, and return its exit status."""
    if (stopped := stop.cause(exc)) is not None:
        stop.tell(stopped)
        return stopped.status
    if isinstance(exc, click.Abort | KeyboardInterrupt):
        return 130
    if isinstance(exc, SystemExit) and not own:  # a package's command may end as it likes
        if exc.code is not None and not isinstance(exc.code, int):
            _say(str(exc.code), 1)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    if debug:
        from .records import in_message

        where = in_message("".join(traceback.format_exception(exc)))
        if not report(where.rstrip(), 1):  # ranks that fail alike are one traceback
            click.echo(where, nl=False, err=True)
        return 1
    message, status = describe(exc)
    _say(message, status)
    return status


def describe(exc: BaseException) -> tuple[str, int]:
    """Return what a user is told of an exception, and the exit status that goes with it."""
    from .records import in_message  # not before there is something to say

    message, status = _described(exc)
    return harmless(in_message(message)), status


def _described(exc: BaseException) -> tuple[str, int]:
    if isinstance(exc, SpecForgeError):
        return str(exc), exc.exit_code
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":  # torch's
        then = (
            "Try less at a time: train.batch_size=1, data.max_length=512, target.batch_tokens=1024"
        )
        return f"there is too little memory. {then}\n{cut(said(exc), 300)}".strip(), 1
    if isinstance(exc, OSError) and exc.errno in CANNOT_WRITE:
        then = "Make room there or choose another place, then run the same command again"
        return f"{cannot_write(exc)}. {remedied(then, exc)}", 1
    return (
        f"{type(exc).__name__}: {cut(said(exc), LONGEST)}\nAdd --debug to see where it came from",
        1,
    )


def _say(message: str, status: int) -> None:
    if report(message, status):
        return
    rank = os.environ.get("RANK")
    prefix = "error: " if rank is None else f"error (rank {rank}): "
    click.echo(f"{prefix}{message}", err=True)


def _say_stopped(stopped: stop.Interrupted) -> None:
    if not report(str(stopped), stopped.status):
        click.echo(str(stopped), err=True)
    _tidy()


def report(message: str, status: int) -> bool:
    """Leave the first message of this rank to our own launcher; False where there is none."""
    if (directory := os.environ.get(PRIVATE)) is None:
        return False
    rank = int(os.environ["RANK"])
    path = _path(Path(directory), rank)
    if not path.exists():
        mine = Report(rank, message, status, time.monotonic())
        with contextlib.suppress(OSError):  # the launcher is gone
            write_file(path, json.dumps(asdict(mine)).encode())
    return True


def read_report(directory: Path, rank: int) -> Report | None:
    """Return what a rank has left for its launcher, if anything yet."""
    try:
        return Report(**json.loads(_path(directory, rank).read_bytes()))
    except FileNotFoundError:
        return None


def _path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.json"


def _tidy() -> None:
    """Remove the directory of a launcher that could not."""
    directory = os.environ.get(PRIVATE)
    if directory is not None and os.getppid() != _launcher():
        shutil.rmtree(directory, ignore_errors=True)


def _launcher() -> int | None:
    """Return the process without which this rank ends, if it is one: ours, or torch's."""
    if (ours := os.environ.get(LAUNCHER)) is not None:
        return int(ours)
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def _skip_teardown(status: int) -> None:
    """End a process that used torch, before Python is torn down around threads that still run.

    One that comes back from an operation of torch at that time makes the process abort (pytorch
    issue 38228).  torch's caches keep process groups, and so their threads, whatever is destroyed.
    """
    if "torch._C" in sys.modules:  # also where a signal has cut off the import of the rest
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
