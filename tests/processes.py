"""Processes of `specforge` that tests send signals to, and how they end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from specforge_core.testing.forked import Forked

Process = subprocess.Popen[str] | Forked
# what is promised is 5; a machine that also runs other tests may take longer to start a thread
SECONDS = 10.0  # with a core for each process that runs
# what is said of work that takes longer than most: its progress, and that a signal has been heard
SLOW = re.compile(r"^([a-z]+( \w+)? \d+(/\d+)?(  .*)?|finishing the step, .*)\n", re.MULTILINE)


def patience() -> float:
    """Return the seconds within which a process has to end, as busy as the machine is.

    Nothing of Python runs while the loader links torch's libraries: some 0.5 s of a core, and 6 s
    where ten processes share two.
    """
    return SECONDS * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def wait(process: Process, reached: Callable[[], bool]) -> None:
    """Wait until a running process has come so far."""
    for _ in range(4000):
        ended = process.poll() is not None  # before the look: it may come so far and end behind it
        if reached():
            return
        assert not ended, process.communicate()
        time.sleep(0.03)
    raise AssertionError("it did not happen within two minutes")


def end(process: Process, *signals: int, apart: float = 0.6) -> tuple[int, str, str]:
    """Send signals; return the status, stdout and stderr of a process that has to end by them.

    Left out is what only a slow machine or disk has said besides.
    """
    start = time.monotonic()
    for number, signum in enumerate(signals):
        if number:
            delivered(process)
            time.sleep(apart)
        if process.poll() is None:
            process.send_signal(signum)
    out, err = process.communicate(timeout=max(60.0, patience()))
    err = SLOW.sub("", err)
    seconds = time.monotonic() - start
    print(f"ended {seconds:.1f} s after the first of {len(signals)} signals")
    assert seconds < patience()
    assert "Traceback" not in err
    assert process.returncode is not None
    return process.returncode, out, err


def delivered(process: Process) -> None:
    """Wait until a process has taken the signals that it was sent: of two alike that wait, one is.

    A busy machine may have no time for it for longer than two signals are apart.
    """
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError):  # it ends
            status = Path(f"/proc/{process.pid}/status").read_text()
            if not int(re.findall(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)[0], 16):
                return
        time.sleep(0.01)


def alive(process: int) -> bool:
    """Say whether a process runs; one that nobody has waited for yet does not."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def children(process: int) -> dict[int, int]:
    """Return the process ids of a launcher's ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        name, _, number = Path(f"/proc/{child}/comm").read_text().strip().partition(" ")
        if name == "rank" or "RANK" in environment:  # forked, or started with an environment
            found[int(number or environment["RANK"])] = int(child)
    return found


def listening(process: int) -> set[str]:
    """Return the addresses, in the kernel's hexadecimal, on which a process accepts TCP."""
    inodes = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            name = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
        if name.startswith("socket:["):
            inodes.add(name.removeprefix("socket:[").removesuffix("]"))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                addresses.add(columns[1].rpartition(":")[0])
    return addresses
