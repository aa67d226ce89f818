"""Runs where SGLang is installed: imports it once, and forks a process for each script.

python sglang_forks.py SOCKET

Scripts can import what lies beside this one.  Who connects gets a "+" when a process is there for
it, sends a line of JSON, [SCRIPT, ARGUMENT...], and gets [STATUS, STDOUT, STDERR].  The server says
when it listens, and ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path


def serve(place: str) -> None:
    """Fork a process for each connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("listening", flush=True)
        threading.Thread(target=end_with_parent, daemon=True).start()
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                answer(connection)
            connection.close()


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def answer(connection: socket.socket) -> None:
    """Be `python SCRIPT ARGUMENTS...`, say what came of it, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.sendall(b"+")
    with connection.makefile() as asked:
        script, *arguments = json.loads(asked.readline())
    outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    for number, file in enumerate(outputs, start=1):
        os.dup2(file.fileno(), number)
    status: object = 1
    try:
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as exc:
        status = exc.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    said = []
    for file in outputs:
        file.seek(0)
        said.append(file.read().decode(errors="replace"))
    connection.sendall(json.dumps([status, *said]).encode())
    os._exit(0)


if __name__ == "__main__":
    import export_forward  # noqa: F401  which imports what every script does

    serve(sys.argv[1])
