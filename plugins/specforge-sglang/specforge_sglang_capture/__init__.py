"""The part that runs inside SGLang: it hands captured hidden states to a trainer.

SGLang loads this package through its entry-point group `sglang.srt.plugins` in every one of
its processes.  Without the environment variable `SPECFORGE_SGLANG_CAPTURE=1` it does nothing.
It needs torch and the standard library only, and must not import specforge_core: SGLang lives
in an environment of its own.
"""

from __future__ import annotations

import os

ENABLE_ENV = "SPECFORGE_SGLANG_CAPTURE"
DIRECTORY_ENV = "SPECFORGE_SGLANG_DIR"  # where hand-off directories are, if not in /dev/shm
RECEIVERS_ENV = "SPECFORGE_SGLANG_RECEIVERS"  # HOST or HOST:PORT, ...: where states may be posted
LIFELINE_ENV = "SPECFORGE_SGLANG_LIFELINE"  # a pipe's descriptor; its end ends a child server
ARGUMENTS_ENV = "SPECFORGE_SGLANG_ARGUMENTS"  # JSON: more of them, which ps does not show
# a child server's working directory has this file, with this in it, and is deleted with the server
MADE, MADE_BY = ".specforge-server", "made by specforge-sglang for one server\n"
MIN_VERSION = (0, 5, 14)

_registered = False


def register() -> None:
    """Hook SGLang's model runner, if a capture is asked for.  SGLang calls this."""
    global _registered
    if os.environ.get(ENABLE_ENV) != "1" or _registered:
        return
    from sglang.srt.plugins.hook_registry import (  # type: ignore[import-not-found]
        HookRegistry,
        HookType,
    )

    from .hooks import after_load_model, before_forward

    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.load_model", after_load_model, HookType.AFTER)
    HookRegistry.register(f"{runner}.forward", before_forward, HookType.BEFORE)
    _registered = True


def parse_version(text: str) -> tuple[int, ...]:
    """Return the release numbers of a version: "0.5.15.post1" gives (0, 5, 15)."""
    numbers = []
    for part in text.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)
