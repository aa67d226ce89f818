"""What SGLang's own classes compute from exports, for the tests of every package that it serves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import TargetInfo

SGLANG = Path(__file__).parent / "specforge-sglang" / "tests"
Tensors = dict[str, Tensor]
# SGLang's modules of the models that are tested; each of its processes imports 200 others
MODELS = {"dflash", "dspark", "gemma3_causal", "lilicorr", "llama", "llama_eagle3"}
MODELS |= {"olmo2", "qwen3", "transformers"}


def locate(version: str, cache: Path) -> str:
    """Return the interpreter of an environment with SGLang; it is made once, in `cache`.

    Skips the test where it cannot be made, and fails it where `SPECFORGE_REQUIRE_SGLANG` is 1.
    """
    if named := os.environ.get("SPECFORGE_SGLANG_PYTHON"):
        return named
    cache.mkdir(parents=True, exist_ok=True)
    venv = cache / f"sglang-venv-{version}"
    ready = venv / ".ready"
    with (cache / f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be making it
        if not ready.exists():
            made = subprocess.run(
                [str(SGLANG / "install_cpu.sh"), str(venv), version],
                env={**os.environ, "PYTHON": sys.executable},
                capture_output=True,
                text=True,
            )
            if made.returncode != 0:
                lines = made.stderr.strip().splitlines() or ["no reason given"]
                reason = f"SGLang {version} cannot be installed here: {lines[-1]}"
                if os.environ.get("SPECFORGE_REQUIRE_SGLANG") == "1":
                    pytest.fail(reason, pytrace=False)
                pytest.skip(reason)
            ready.touch()
    found = {path.stem for path in venv.glob("lib/*/site-packages/sglang/srt/models/*.py")}
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(found - MODELS))
    return str(venv / "bin" / "python")


@pytest.fixture(scope="session")
def cache() -> Path:
    """Return where environments are kept from one test run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge"


@pytest.fixture(scope="session")
def find_sglang() -> Callable[[str, Path], str]:
    """Return `locate`."""
    return locate


class SGLangForks:
    """Processes in which SGLang is imported already: forks of one, which all test processes share.

    There is one of each interpreter, in `folder`, where its socket is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def run(self, python: str, script: Path, *arguments: str) -> str:
        """Run `python SCRIPT ARGUMENTS...`, as it were; return what it printed."""
        with self._connect(python) as connection, connection.makefile() as said:
            connection.sendall(json.dumps([str(script), *arguments]).encode() + b"\n")
            status, out, err = json.loads(said.read() or '[-1, "", "it was killed"]')
        assert status == 0, err[-3000:]
        return str(out)

    def _connect(self, python: str) -> socket.socket:
        place = self._folder / Path(python).parents[1].name
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in range(2):
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.connect(str(place))
                    if connection.recv(1) == b"+":
                        return connection
                except OSError:  # there is none, or its test process has ended
                    pass
                connection.close()
                self._start(python, place)
        raise AssertionError(f"nothing listens at {place}")

    def _start(self, python: str, place: Path) -> None:
        place.unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        with place.with_name(f"{place.name}.log").open("w+") as log:
            process = subprocess.Popen(
                [python, str(SGLANG / "sglang_forks.py"), str(place)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            self._started.append(process)
            assert process.stdout is not None
            if process.stdout.readline() != "listening\n":
                log.seek(0)
                raise AssertionError(log.read()[-3000:])

    def close(self) -> None:
        """End what was started here; what it has forked ends by itself."""
        for process in self._started:
            process.communicate()


@pytest.fixture(scope="session")
def sglang_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangForks]:
    """Return what runs scripts where SGLang is installed."""
    own = tmp_path_factory.getbasetemp()
    forks = SGLangForks(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)
    yield forks
    forks.close()


@dataclass(frozen=True)
class Exports:
    """The exports of one module's tests, each in a folder of its name."""

    folder: Path
    forks: SGLangForks

    def plant(self, name: str, mistake: Callable[[dict[str, Any], Tensors], None]) -> None:
        """Copy an export to `NAME-MISTAKE-wrong`, with a mistake in its config or weights."""
        path = shutil.copytree(self.folder / name, self.folder / f"{name}-{mistake.__name__}-wrong")
        config = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
        mistake(config, weights)
        (path / "config.json").write_text(json.dumps(config))
        save_file(weights, path / "model.safetensors")

    def compute(
        self, python: str, script: Path, target: str, **request: Any
    ) -> Callable[[str], Tensors]:
        """Run `script TARGET REQUEST.json PORT OUTPUT EXPORT...` for all exports, in one process.

        It can import specforge-sglang's export_forward.py and export_keys.py, and writes
        OUTPUT/NAME.safetensors for each export.  Returns a function that reads these.
        """
        from specforge_sglang.child import free_port

        out = Path(tempfile.mkdtemp(prefix="computed-", dir=self.folder.parent))
        (out / "request.json").write_text(json.dumps(request))
        port = free_port()  # none that a connection may be given before it is listened on
        exports = map(str, sorted(self.folder.iterdir()))
        request_file = str(out / "request.json")
        self.forks.run(python, script, target, request_file, str(port), str(out), *exports)
        return lambda name: load_file(out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    """Return a toy target whose head is not its embedding."""
    path = tmp_path_factory.mktemp("target") / "model"
    save_toy_target(path, tie_word_embeddings=False)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, sglang_forks: SGLangForks) -> Exports:
    """Return a place for exports, empty at first."""
    return Exports(tmp_path_factory.mktemp("exports"), sglang_forks)


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest,
    cache: Path,
    target: TargetConfig,
    references: dict[str, Tensors],
    exports: Exports,
) -> Callable[[str], Tensors]:
    """Return what SGLang 0.5.23 computes from each of a module's exports, all in one process.

    The module has `references`, which writes the exports, the tokens IDS and LAST, and beside it
    sglang_forward.py.
    """
    assert references
    script, python = request.path.with_name("sglang_forward.py"), locate("0.5.23", cache)
    module = request.module
    return exports.compute(python, script, target.path, ids=module.IDS, last=module.LAST)


@pytest.fixture
def qwen3_8b() -> TargetInfo:
    """Return the shapes of Qwen3-8B, which the benchmarks have."""
    config = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "rope_theta": 1e6,
    }
    return TargetInfo(
        name_or_path="",
        revision=None,
        hidden_size=4096,
        num_layers=36,
        vocab_size=151936,
        config=config,
    )
