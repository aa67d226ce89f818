"""Signals, and the thread that ends a command which takes too long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO

import pytest

from specforge_core import stop

from .processes import end

LISTEN = """
import ctypes, os, signal, sys, threading, time
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(256)
from specforge_core import stop
def say(stopped): print(stopped, flush=True)
stop.listen(say)
def run():
{body}
def ready(): print("ready", flush=True)
try:
    run()
except stop.Interrupted as exc:
    stop.leaving()
    stop.tell(exc)
    sys.exit(exc.status)
"""
FOREVER = "ready()\nwhile True: time.sleep(0.1)"
# no handler runs before it returns, and it never does: a mutex that is locked twice
DEEP = "stop.SECONDS = 1.0; lock(mutex); ready(); lock(mutex)"
# says when the first signal has been counted
HEARD = """def hear():
    while not stop.count(): time.sleep(0.01)
    print("heard", flush=True)
threading.Thread(target=hear, daemon=True).start()"""


def script(body: str) -> str:
    return LISTEN.format(body="\n".join(f"    {line}" for line in body.splitlines()))


def hear_hangups() -> None:
    """Undo what nohup may have done to the process that runs the tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def begin(body: str, preexec: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    code = script(body)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=preexec or hear_hangups,
    )
    assert line(process.stdout) == "ready\n"
    return process


def line(stream: IO[str] | None) -> str:
    """Read a line and no more: `communicate` does not return what a stream has read ahead."""
    assert stream is not None
    found = b""
    while not found.endswith(b"\n") and (byte := os.read(stream.fileno(), 1)):
        found += byte
    return found.decode()


@pytest.mark.parametrize("signum", stop.SIGNALS)
@pytest.mark.parametrize("body", [FOREVER, DEEP])
def test_a_signal_ends_what_has_nothing_to_keep(signum: int, body: str) -> None:
    status, out, err = end(begin(body), signum)
    assert status == 128 + signum
    name = signal.Signals(signum).name
    assert out == (
        f"stopped by {name}: nothing that was finished is lost. "
        "Start the same command again to go on\n"
    )
    assert err == ""


def test_what_is_kept_is_kept_after_two_signals_too() -> None:
    body = """with stop.keeping(20.0):
    ready()
    while not stop.asked(): time.sleep(0.05)
    time.sleep(1.5)
print("saved", flush=True)
sys.exit(7)"""
    assert end(begin(body), signal.SIGTERM, signal.SIGTERM) == (7, "saved\n", "")


@pytest.mark.parametrize("apart", [0.15, 0.6])
def test_a_second_signal_ends_what_does_not_get_done(apart: float) -> None:
    process = begin(f"{HEARD}\nwith stop.keeping(1.0):\n    {DEEP}")
    process.send_signal(signal.SIGINT)
    assert line(process.stdout) == "heard\n"  # the time between them is that of the process
    time.sleep(apart)
    status, out, err = end(process, signal.SIGINT)
    assert (status, err) == (130, "")
    assert out.startswith("stopped by SIGINT: what was saved before is whole. Start")


def test_of_two_at_once_one_is_the_cause_wherever_it_is_asked_for() -> None:
    # as a kernel may have it that runs the later signal's handler first: it tells the thread
    body = """ready()
os.write(stop._state.fd, bytes([signal.SIGTERM]))
while stop.asked() is None: time.sleep(0.01)
signal.raise_signal(signal.SIGINT)"""
    status, out, err = end(begin(body))
    assert (status, err) == (143, "")
    assert out.startswith("stopped by SIGTERM: ")


def test_the_first_one_waits_and_says_so() -> None:
    body = f"stop.NOTE_SECONDS = 0.5\nwith stop.keeping(1.0):\n    {DEEP}"
    process = begin(body)
    process.send_signal(signal.SIGTERM)
    note = "finishing the step, then saving; a second signal ends this without saving\n"
    assert line(process.stderr) == note
    time.sleep(stop.POLL_SECONDS + 1.0)
    assert process.poll() is None
    status, _, err = end(process, signal.SIGTERM)
    assert (status, err) == (143, "")


def test_the_end_waits_for_what_is_being_said() -> None:
    body = """stop.SECONDS, stop.POLL_SECONDS, stop.TELL_SECONDS = 0.1, 0.05, 20.0
def slowly(stopped):
    time.sleep(1.0)
    say(stopped)
stop._state.tell = slowly
ready()
while True: time.sleep(0.1)"""
    status, out, err = end(begin(body), signal.SIGTERM)
    assert (status, err) == (143, "")
    assert out.startswith("stopped by SIGTERM: ")


def test_a_library_that_swallows_it_does_not_keep_the_command_running() -> None:
    body = """ready()
while True:
    try: time.sleep(0.1)
    except: pass"""
    status, out, _ = end(begin(body), signal.SIGTERM)
    assert status == 143
    assert out.startswith("stopped by SIGTERM")


def test_what_a_library_has_swallowed_is_raised_before_anything_is_begun() -> None:
    body = """ready()
try:
    while True: time.sleep(0.05)
except stop.Interrupted: pass
with stop.keeping():
    print("begun", flush=True)"""
    status, out, err = end(begin(body), signal.SIGTERM)
    assert (status, err) == (143, "")
    assert out.startswith("stopped by SIGTERM: ")


def test_a_finalizer_that_swallows_it_says_nothing_of_it() -> None:
    """Python would print a traceback and go on; each import has such code."""
    body = """class Gone:
    def __del__(self):
        ready()
        time.sleep(1)
gone = Gone()
del gone
while True: time.sleep(0.1)"""
    status, out, err = end(begin(body), signal.SIGTERM)
    assert (status, err) == (143, "")
    assert out.startswith("stopped by SIGTERM")


def test_nohup_goes_on() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = begin(FOREVER, ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    assert end(process, signal.SIGTERM)[0] == 143


def test_a_fork_does_not_hand_its_signals_to_its_parent() -> None:
    body = """ready()
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
_, status = os.waitpid(child, 0)
time.sleep(0.5)
print(os.waitstatus_to_exitcode(status), stop.asked(), flush=True)
os._exit(0)"""
    assert end(begin(body)) == (0, f"{-signal.SIGTERM} None\n", "")


def test_a_process_ends_when_its_launcher_is_gone() -> None:
    code = script(FOREVER).replace("listen(say)", "listen(say, os.getppid())")
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read().startswith("stopped by SIGTERM")  # to its end: nobody writes


def test_what_a_cut_off_import_left_of_torch_is_not_torn_down() -> None:
    code = """import sys, types
import click
from specforge_core.process import run
class Last:
    def __del__(self): print("torn down")
last = Last()
sys.modules["torch._C"] = types.ModuleType("torch._C")
run(click.Command("nothing", callback=lambda: print("done")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"


def test_listening_in_a_block_leaves_nothing_behind() -> None:
    def block() -> None:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with pytest.raises(stop.Interrupted, match="stopped by SIGTERM"):
        block()
    assert stop.asked() is None
    with stop.listening():
        assert stop.asked() is None
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
