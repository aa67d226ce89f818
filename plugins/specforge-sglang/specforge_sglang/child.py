"""An SGLang server as a child process, in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO

import specforge_sglang_capture
from specforge_openai.http_json import Refused, ServerDown
from specforge_sglang_capture import (
    ARGUMENTS_ENV,
    DIRECTORY_ENV,
    ENABLE_ENV,
    LIFELINE_ENV,
    MADE,
    MADE_BY,
    RECEIVERS_ENV,
)

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.records import MASK, is_secret, secret_values
from specforge_core.train.launch import LOCAL
from specforge_core.types import TargetInfo

from .client import Client
from .options import Flag, SGLangOptions

LOG_LINES = 20
STOP_SECONDS = 10.0
# what torchrun sets would make SGLang's own process group join the trainer's
TRAINER_ONLY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
CPU_FLAGS: dict[str, Flag] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.5,  # its own guess for a CPU can be negative
}
CAPTURE = ("-m", "specforge_sglang_capture")
# a plain server, which ends with its parent too
PLAIN = (
    "-c",
    "import runpy, sys\n"
    "from specforge_sglang_capture.__main__ import check_version, follow_parent, hidden_arguments\n"
    "check_version()\n"
    "follow_parent()\n"
    "sys.argv = ['sglang.launch_server', *sys.argv[1:], *hidden_arguments()]\n"
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)\n",
)


class ChildServer:
    """A running server; it ends with this process, however that ends.

    It hands out states, unless `launch` is PLAIN; `flags` replace those of a capture.  States go
    to files, and to the `receiver` HOST:PORT.
    """

    def __init__(
        self,
        target: TargetConfig,
        info: TargetInfo,
        options: SGLangOptions,
        flags: Mapping[str, Flag] | None = None,
        launch: tuple[str, str] = CAPTURE,
        receiver: str = "",
    ) -> None:
        assert options.python is not None
        self._check_python(options.python)
        flags = with_key(server_flags(target, info, options) if flags is None else flags)
        self._secrets = secret_values({"args": flags, "env": options.env})
        self._directory = Path(tempfile.mkdtemp(prefix="specforge-sglang-"))
        self._log = self._directory / "server.log"
        (self._directory / MADE).write_text(MADE_BY, encoding="utf-8")
        write_overlay(self._directory)
        self._receiver = receiver
        self.url = f"http://127.0.0.1:{free_port()}"
        shown = {name: value for name, value in flags.items() if not is_secret(name)}
        command = [options.python, *launch, *as_arguments(shown)]
        self._key = None if flags.get("api_key") in (None, False) else str(flags["api_key"])
        command += ["--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1]]
        reading, self._lifeline = os.pipe()
        try:
            with self._log.open("wb") as log:
                self._process = self._start(command, flags, options, reading, log)
        finally:
            os.close(reading)

    def _start(
        self,
        command: list[str],
        flags: Mapping[str, Flag],
        options: SGLangOptions,
        reading: int,
        log: IO[bytes],
    ) -> subprocess.Popen[bytes]:
        kept = os.environ.items() - LOCAL.items()
        env = {k: v for k, v in kept if not k.startswith(("TORCHELASTIC_", "MASTER_"))}
        for name in (*TRAINER_ONLY, "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH"):
            env.pop(name, None)
        if not {"dist_init_addr", "nnodes", "dp_size", "data_parallel_size"} & flags.keys():
            env |= self._own_machine()
        env |= options.env
        env[ENABLE_ENV] = "1" if CAPTURE[1] in command else "0"
        env[RECEIVERS_ENV] = ",".join(filter(None, (env.get(RECEIVERS_ENV), self._receiver)))
        env[LIFELINE_ENV] = str(reading)
        # everybody on this machine can read a command line, and only this user an environment
        hidden = {name: value for name, value in flags.items() if is_secret(name)}
        env[ARGUMENTS_ENV] = json.dumps(as_arguments(hidden))
        if options.directory is not None:
            env[DIRECTORY_ENV] = str(options.directory.resolve())
        if flags.get("device") == "cpu":
            env.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=self._directory,  # where -m finds the plugin, whatever PYTHONPATH is or becomes
            pass_fds=(reading,),
            start_new_session=True,  # a group of its own, which can be ended as a whole
        )

    def _own_machine(self) -> dict[str, str]:
        """Return what keeps one group of ranks to this machine: its file would mix up several."""
        return {  # torch's own store hears everybody
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self._directory / 'ranks'}",
            **LOCAL,
            # by these SGLang tells the shared memory of servers on one machine apart
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.url.rsplit(":", 1)[1],
        }

    @staticmethod
    def _check_python(python: str) -> None:
        """Raise ConfigError when there is no such interpreter; SGLang is looked for later."""
        if shutil.which(python) is None:
            raise ConfigError(
                f"target.options.python {python!r} is no interpreter that can be run. Try: "
                "target.options.python=/path/to/sglang-venv/bin/python"
            )

    def client(self, timeout: float) -> Client:
        """Return what speaks to the server, with its key."""
        return Client(self.url, timeout, self._key)

    def wait(self, client: Client, timeout: float) -> None:
        """Wait until the server answers; CaptureError with its last words when it does not."""
        give_up = time.monotonic() + timeout
        while True:
            self.check_alive()
            try:
                client.get("/server_info")
                return
            except Refused as exc:
                if str(exc).startswith(("HTTP 401", "HTTP 403")):  # which no time mends
                    raise CaptureError(
                        f"SGLang refuses what it is asked: {exc}. Try: "
                        "target.options.server_args.api_key=KEY, which is sent along"
                    ) from exc
            except ServerDown:
                pass
            if time.monotonic() > give_up:
                raise CaptureError(
                    f"SGLang did not start in {timeout:.0f} s. Its last lines:\n{self.last_words()}"
                    "\nTry: target.options.start_timeout=1800"
                )
            time.sleep(0.2)

    def check_alive(self) -> None:
        """Raise CaptureError with its last words when the server has ended."""
        if (status := self._process.poll()) is not None:
            raise CaptureError(
                f"SGLang ended with status {status}. Its last lines:\n{self.last_words()}\n"
                "Try: target.options.server_args, or another target.engine"
            )

    def last_words(self) -> str:
        """Return the end of the server's log."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(f"  {line[:300]}" for line in lines[-LOG_LINES:]) or "  (nothing)"

    def close(self) -> None:
        """End the server and everything it started."""
        for sign, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        os.close(self._lifeline)
        shutil.rmtree(self._directory, ignore_errors=True)


def server_flags(target: TargetConfig, info: TargetInfo, options: SGLangOptions) -> dict[str, Flag]:
    """Return the server's flags; the user's own win over defaults."""
    dtype = target.dtype if target.dtype != "auto" else _own_dtype(info)
    local = Path(target.path)
    flags: dict[str, Flag] = {
        "model_path": str(local.resolve()) if local.is_dir() else target.path,  # it runs elsewhere
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_prefill_tokens": target.batch_tokens,
        "log_level": "warning",
        "trust_remote_code": target.trust_remote_code,
    }
    if info.revision is not None and not local.is_dir():
        flags["revision"] = info.revision
    if uses_cpu(target):
        flags |= {**CPU_FLAGS, "max_total_tokens": max(4096, 2 * target.batch_tokens)}
    else:
        _, _, number = target.device.partition(":")
        flags["base_gpu_id"] = int(number or os.environ.get("LOCAL_RANK", "0"))
    return {**flags, **options.server_args}


def with_key(flags: Mapping[str, Flag]) -> Mapping[str, Flag]:
    """Return flags with a key for once, where they have none: a port is open to every user here.

    SGLang takes none where it has several tokenizers.
    """
    if "api_key" in flags or flags.get("tokenizer_worker_num", 1) != 1:
        return flags
    return {**flags, "api_key": secrets.token_hex(16)}


def uses_cpu(target: TargetConfig) -> bool:
    """Say whether the target runs on a CPU here."""
    return target.device == "cpu" or (target.device == "auto" and not _has_gpu())


def _own_dtype(info: TargetInfo) -> str:
    """Return the checkpoint's dtype: SGLang's own `auto` would turn float32 into float16."""
    named = info.config.get("dtype") or info.config.get("torch_dtype") or "auto"
    return str(named).removeprefix("torch.")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def as_arguments(flags: Mapping[str, Flag]) -> list[str]:
    """Return flags as a command line; True is a flag without a value, False leaves it out."""
    arguments = []
    for name, value in flags.items():
        if value is False:
            continue
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments


def write_overlay(site: Path) -> None:
    """Put the part that runs in SGLang into a directory for `sys.path`, and nothing else.

    SGLang finds its plugins by installed metadata, so that is written beside the package.
    """
    package = Path(specforge_sglang_capture.__file__).parent
    site.mkdir(parents=True, exist_ok=True)
    (site / package.name).symlink_to(package.resolve(), target_is_directory=True)
    own = version("specforge-sglang")
    info = site / f"specforge_sglang_capture-{own}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: specforge-sglang-capture\nVersion: {own}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    entry = "[sglang.srt.plugins]\nspecforge_capture = specforge_sglang_capture:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")


def free_port() -> int:
    """Return a port that nothing listens on.

    Below 32,768: SGLang also takes the one 10,000 above, which must exist, and what the
    system hands out by itself (from 32,768 on) may be 60,000.  Ranks of one seed get others.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise CaptureError("no free port between 20000 and 32000 for SGLang. Stop other servers")
