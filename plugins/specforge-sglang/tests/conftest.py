"""Servers to capture from: processes that stand in for SGLang, and SGLang itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.child import CPU_FLAGS, as_arguments, free_port, write_overlay

from specforge_core.config import TargetConfig
from specforge_core.testing.close import close
from specforge_core.testing.forked import Forked, python
from specforge_core.types import Prompt, TargetCapture

HERE = Path(__file__).parent
TERMS = 8 * (4 * 32 + 64)  # of captures: at most eight layers of width 32 and 64
NAMED = os.environ.get("SPECFORGE_SGLANG_PYTHON")  # of version SPECFORGE_SGLANG_VERSION
# the oldest that is supported, and the newest that runs on a CPU
EACH = "0.5.14" if NAMED else "0.5.14 0.5.23"
VERSIONS = os.environ.get("SPECFORGE_SGLANG_VERSION", EACH).split()


@dataclass
class StandIn:
    """A process that answers as an SGLang server with specforge's plugin would."""

    process: Forked
    url: str

    def served(self) -> int:
        with urllib.request.urlopen(f"{self.url}/server_info") as response:
            return int(json.load(response)["served"])

    def configure(self, **options: Any) -> None:
        urllib.request.urlopen(f"{self.url}/options", json.dumps(options).encode()).close()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., StandIn]


def launch(root: Path, port: int | None = None, **options: Any) -> StandIn:
    port = port or free_port()  # none of those that connections are given, and no test twice
    env = {**os.environ, "SPECFORGE_SGLANG_DIR": str(root)}
    env["SPECFORGE_SGLANG_RECEIVERS"] = "127.0.0.1"
    script = HERE / "stand_in_server.py"
    process = python(script, str(port), json.dumps(options), env=env)
    made = StandIn(process, f"http://127.0.0.1:{port}")
    for _ in range(600):
        try:
            made.served()
            return made
        except OSError:
            assert made.process.poll() is None, made.process.communicate()
            time.sleep(0.05)
    raise AssertionError("the stand-in did not start")


@pytest.fixture(scope="session")
def session_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("handoff")


@pytest.fixture
def root(session_root: Path) -> Iterator[Path]:
    """Where hand-off directories are made; empty at the start of each test."""
    yield session_root
    for left in session_root.iterdir():
        shutil.rmtree(left)


@pytest.fixture(scope="session")
def lasting(session_root: Path) -> Iterator[StandIn]:
    made = launch(session_root)
    yield made
    made.kill()


@pytest.fixture
def shared(lasting: StandIn) -> Start:
    """Return a function that gives the one server that every test may use, but not kill."""

    def configured(**options: Any) -> StandIn:
        lasting.configure(**options)
        return lasting

    return configured


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Return a function that starts a server; options are those of stand_in_server.py."""
    running: list[StandIn] = []

    def begin(port: int | None = None, **options: Any) -> StandIn:
        running.append(launch(root, port, **options))
        return running[-1]

    yield begin
    for made in running:
        made.kill()


@pytest.fixture
def target(toy_target: Path, root: Path) -> Callable[..., TargetConfig]:
    """Return a function that makes the target's config from servers and options."""

    def make(*servers: StandIn, **options: Any) -> TargetConfig:
        urls = {"urls": [s.url for s in servers]} if servers else {}
        return TargetConfig(
            path=str(toy_target),
            engine="sglang",
            dtype="float32",
            device="cpu",
            batch_tokens=1024,
            options={**urls, "directory": str(root), **options},
        )

    return make


@pytest.fixture
def prompts() -> Callable[..., list[Prompt]]:
    """Return a function that makes prompts of the lengths given, with different tokens."""

    def make(*lengths: int) -> list[Prompt]:
        draw = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, 250, (length,), generator=draw) for length in lengths]
        return [
            Prompt(index=index, input_ids=ids, loss_mask=torch.ones_like(ids))
            for index, ids in enumerate(rows)
        ]

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[list[TargetCapture], list[TargetCapture]], None]:
    """Return a function that asserts that captures of the same prompts hold equal states."""

    def check(found: list[TargetCapture], expected: list[TargetCapture]) -> None:
        by_index = {capture.index: capture for capture in found}
        assert len(by_index) == len(found) == len(expected)
        for want in expected:
            got = by_index[want.index]
            assert got.hidden_states.keys() == want.hidden_states.keys()
            for layer, state in want.hidden_states.items():
                close(got.hidden_states[layer], state, terms=TERMS)
            assert (got.final is None) == (want.final is None)
            if want.final is not None:
                close(got.final, want.final, terms=TERMS)
            assert (got.next_tokens is None) == (want.next_tokens is None)
            if want.next_tokens is not None:
                assert torch.equal(got.next_tokens, want.next_tokens)
            assert (got.logsumexp is None) == (want.logsumexp is None)
            if want.logsumexp is not None:
                close(got.logsumexp, want.logsumexp, terms=TERMS)

    return check


@pytest.fixture(scope="session")
def newest_sglang_python(cache: Path, find_sglang: Any) -> str:
    """Return the interpreter of the newest version, for what is the same in all."""
    return str(find_sglang(VERSIONS[-1], cache))


@pytest.fixture(scope="session", params=VERSIONS)
def sglang_version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def sglang_python(sglang_version: str, cache: Path, find_sglang: Any) -> str:
    """Return the interpreter of each version in turn."""
    return str(find_sglang(sglang_version, cache))


@pytest.fixture(scope="session")
def oldest_sglang_python(cache: Path, find_sglang: Any) -> str:
    """Return the interpreter of the oldest version, for what is the same in all."""
    return str(find_sglang(VERSIONS[0], cache))


@dataclass
class RealServer:
    """SGLang on a CPU, as a user starts it; its port stays the same when it is started again."""

    python: str
    target: Path
    directory: Path
    module: str
    port: int = field(default_factory=free_port)
    process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        flags = {**CPU_FLAGS, "model_path": str(self.target), "dtype": "float32"}
        flags |= {"port": self.port, "max_total_tokens": 4096, "log_level": "warning"}
        command = [self.python, "-m", self.module, *as_arguments(flags)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env |= {"SGLANG_USE_CPU_ENGINE": "1"}
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, cwd=self.directory, start_new_session=True
            )

    def wait(self, seconds: float = 600.0) -> None:
        give_up = time.monotonic() + seconds
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            log = (self.directory / "server.log").read_text()[-3000:]
            assert self.process.poll() is None and time.monotonic() < give_up, log  # noqa: PT018
            time.sleep(0.3)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RealServer]]:
    """Return a function that starts a server; with `capture` it has specforge's plugin."""
    made: list[RealServer] = []

    def make(python: str, target: Path, *, capture: bool = False) -> RealServer:
        module = "specforge_sglang_capture" if capture else "sglang.launch_server"
        made.append(RealServer(python, target, tmp_path_factory.mktemp("server"), module))
        if capture:
            write_overlay(made[-1].directory)
        made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.kill()
