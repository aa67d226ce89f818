"""Start an SGLang server that hands out hidden states: `python -m specforge_sglang_capture`.

Takes every argument of `sglang.launch_server` and adds those that a capture needs.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import (
    ARGUMENTS_ENV,
    ENABLE_ENV,
    LIFELINE_ENV,
    MADE,
    MADE_BY,
    MIN_VERSION,
    parse_version,
)

# the flags that a capture needs, and their values
REQUIRED = {
    "--disable-radix-cache": (),
    "--chunked-prefill-size": ("-1",),
    "--disable-cuda-graph": (),
    "--skip-server-warmup": (),
}


def add_required(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with what a capture needs; SystemExit where they contradict it."""
    result = list(arguments)
    for flag, value in REQUIRED.items():
        if flag not in result:
            result += [flag, *value]
        elif value and result[result.index(flag) + 1 :][:1] != list(value):
            raise SystemExit(f"specforge_sglang_capture: a capture needs {flag} {' '.join(value)}")
    return result


def hidden_arguments() -> list[str]:
    """Return the arguments that came by the environment; processes started from here see none."""
    found: list[str] = json.loads(os.environ.pop(ARGUMENTS_ENV, "[]"))
    return found


def check_version() -> None:
    """Exit with an error when SGLang is missing or too old."""
    wanted = ".".join(map(str, MIN_VERSION))
    remedy = f"Try: {sys.executable} -m pip install 'sglang>={wanted}'"
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise SystemExit(f"SGLang is not installed in {sys.prefix}. {remedy}") from None
    if parse_version(found) < MIN_VERSION:
        raise SystemExit(f"SGLang {found} is older than {wanted}. {remedy}")


def extend_path() -> None:
    """Let Python processes that SGLang starts find the plugin where `-m` found it."""
    here = Path.cwd()
    if Path(__file__).parent.parent == here:  # else it is installed
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(here), others)))


def made_for_server(directory: Path) -> bool:
    """Say whether specforge made a directory for one server, and nobody else has use for it."""
    try:
        return (directory / MADE).read_text(encoding="utf-8") == MADE_BY
    except (OSError, ValueError):
        return False


def follow_parent() -> None:
    """End this process group when the process that started it is gone, however it ended."""
    text = os.environ.pop(LIFELINE_ENV, None)
    if text is None:
        return

    here = Path.cwd()

    def wait() -> None:
        os.read(int(text), 1)  # returns at the end of the pipe: nothing is ever written
        if made_for_server(here):
            shutil.rmtree(here, ignore_errors=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Start the server, in this process."""
    check_version()
    follow_parent()
    extend_path()
    os.environ[ENABLE_ENV] = "1"
    arguments = add_required([*sys.argv[1:], *hidden_arguments()])
    sys.argv = ["sglang.launch_server", *arguments]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
