"""How signals end a command: at once, or after what is worth keeping is saved.

A command listens from its start.  The first signal raises Interrupted in the main thread, unless
that is `keeping` something: then it asks `asked()` in good time, and ends by itself.  A thread
watches over both, since Python runs handlers only between two steps of the main thread, which may
be deep in a library: a command that takes too long is ended by it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 3.0  # that a command may take to end, from a signal on, or from the second while keeping
# seconds in which signals are one: a job's end may reach a process by two ways, at once through
# what started it (timeout hands on what the terminal sent, too), later through a launcher
SAME, SAME_OF_RANKS = 0.1, 0.5
NOTE_SECONDS = 3.0  # from a signal to a line that says what the command is still at
TELL_SECONDS = 0.5  # that a thread may take to say why the command ends
ORPHAN_SECONDS = 20.0  # that a process may take to save and end when its launcher is gone
POLL_SECONDS = 0.5  # between two looks for the launcher
AGAIN = "Start the same command again to go on"


class Interrupted(BaseException):
    """A signal ends the command.  No Exception, so that nothing takes it for a failure.

    `kept` says what is there to go on from.
    """

    def __init__(self, signum: int, kept: str = "nothing that was finished is lost") -> None:
        super().__init__(signum, kept)
        self.signum, self.kept = signum, kept

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, as shells count it."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}: {self.kept}. {AGAIN}"


Tell = Callable[[Interrupted], None]


@dataclass(slots=True)
class _State:
    signum: int | None = None  # the first signal that came
    count: int = 0
    since: float = 0.0  # time.monotonic() from which the command has SECONDS to end
    keep: float | None = None  # seconds that a second signal leaves, inside `keeping`
    raised: bool = False  # Interrupted was, or the command ends by itself
    noted: bool = False
    launcher: int | None = None  # the parent's process id, if this one ends with it
    orphaned: float | None = None  # when it was gone
    tell: Tell | None = None
    telling: threading.Lock = field(default_factory=threading.Lock)  # held by who does
    fd: int = -1  # where the kernel's handler tells the thread; -1: nobody listens


_state = _State()


def asked() -> int | None:
    """Return the signal by which the command was asked to end, if it was."""
    return _state.signum


def count() -> int:
    """Return how many times it was."""
    return _state.count


def cause(exc: BaseException) -> Interrupted | None:
    """Return the Interrupted that an exception is, or that a library made it of."""
    if isinstance(exc, Interrupted):
        return exc
    if _state.raised and _state.signum is not None:
        return Interrupted(_state.signum)
    return None


def check() -> None:
    """Raise Interrupted if a signal came, which a library may have swallowed: torch's import does.

    Called before what has to be kept or tidied up after is begun.
    """
    if _state.signum is not None:
        _state.raised = True
        raise Interrupted(_state.signum)


def tell(stopped: Interrupted) -> None:
    """Say why the command ends; once, whichever thread comes first.  The other waits for it."""
    with _state.telling:
        if _state.tell is not None:
            telling, _state.tell = _state.tell, None
            telling(stopped)


def leaving() -> None:
    """Say that the main thread is on its way out: no signal raises anything in it any more."""
    _state.raised = True
    _state.since = time.monotonic()


@contextmanager
def keeping(seconds: float = SECONDS) -> Iterator[None]:
    """Let a signal only be `asked()` for in this block, which then saves and ends by itself.

    The second one leaves it `seconds` for that.  Raises Interrupted if one came before.
    """
    check()
    _state.keep = seconds
    try:
        yield
    finally:
        _state.keep = None
        if _state.signum is not None:
            leaving()


def listen(telling: Tell, launcher: int | None = None) -> None:
    """Listen to signals until this process ends, or until the parent `launcher` is gone.

    `telling` gets what is to be said when a signal ended the command.  Called in the main thread.
    """
    _state.tell, _state.launcher = telling, launcher  # first: a signal may come while it starts
    _start()
    os.write(_state.fd, b"\0")  # the thread looks for the launcher from now on


@contextmanager
def listening() -> Iterator[None]:
    """Listen to signals in this block, if the process does not already and this is its main thread.

    So training stops at a signal too where it is called from Python.
    """
    global _state
    if _state.fd >= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    old, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    thread = _start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = hook
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(_state.fd)
        thread.join()
        _state = _State()


def _start() -> threading.Thread:
    reading, _state.fd = os.pipe()
    os.set_blocking(_state.fd, False)
    for number in SIGNALS:
        # nohup ignores SIGHUP, and that goes on
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.set_wakeup_fd(_state.fd, warn_on_full_buffer=False)
    before = sys.unraisablehook
    # in a finalizer, as Python's imports have many, it is lost: the thread ends the command then
    sys.unraisablehook = lambda found: (
        None if isinstance(found.exc_value, Interrupted) else before(found)
    )
    thread = threading.Thread(target=_watch, args=(reading,), name="specforge-stop", daemon=True)
    thread.start()
    return thread


def _forget() -> None:
    """In a fork of this process: its signals are not the parent's, nor is what they asked for."""
    global _state
    if _state.fd >= 0:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_DFL)
        _state = _State()


os.register_at_fork(after_in_child=_forget)


def _handle(signum: int, frame: FrameType | None) -> None:
    """In the main thread, some time after the signal."""
    _state.signum = _state.signum or signum
    if _state.keep is None and not _state.raised:
        _state.raised = True
        # the thread may have met another one first: two sent at the same moment have no order
        raise Interrupted(_state.signum)


def _watch(reading: int) -> None:
    """In the thread: count signals as they come, and end the process when it takes too long."""
    try:
        while True:
            wait = POLL_SECONDS if _state.count or _state.launcher is not None else None
            if select.select([reading], [], [], wait)[0]:
                numbers = os.read(reading, 64)
                if not numbers:
                    return
                for number in numbers:
                    _count(number)
            _look_for_launcher()
            _end_if_late()
    finally:
        os.close(reading)


def _count(number: int) -> None:
    if number not in SIGNALS:
        return
    now = time.monotonic()
    same = SAME if _state.launcher is None else SAME_OF_RANKS
    if not _state.count or now - _state.since > same:
        _state.signum = _state.signum or number
        _state.count += 1
        _state.since = now


def _look_for_launcher() -> None:
    if _state.launcher is None or _state.orphaned or os.getppid() == _state.launcher:
        return
    _state.orphaned = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)  # the main thread's handler knows what is to be done


def _end_if_late() -> None:
    now = time.monotonic()
    if _state.orphaned is not None and now - _state.orphaned > ORPHAN_SECONDS:
        _end(Interrupted(signal.SIGTERM))
    if _state.signum is None or not _state.count:
        return
    late = now - _state.since
    if _state.keep is not None and _state.count < 2:
        if late > NOTE_SECONDS and not _state.noted and _state.launcher is None:
            _state.noted = True
            _print("finishing the step, then saving; a second signal ends this without saving")
        return
    if late > (_state.keep or SECONDS):
        stopped = Interrupted(_state.signum)
        if _state.keep is not None:
            stopped.kept = "what was saved before is whole"
        _end(stopped)


def _end(stopped: Interrupted) -> None:
    # in a thread, since whoever reads our output may be what the command waits for
    telling = threading.Thread(target=tell, args=(stopped,), daemon=True)
    telling.start()
    # in parts: a main thread that let no other run may have taken the time of the first one
    for _ in range(10):
        telling.join(TELL_SECONDS / 10)
    os._exit(stopped.status)


def _print(line: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
