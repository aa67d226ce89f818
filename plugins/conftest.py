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
from collections.abc import Callable
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
    return str(venv / "bin" / "python")


@pytest.fixture(scope="session")
def cache() -> Path:
    """Return where environments are kept from one test run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge"


@pytest.fixture(scope="session")
def find_sglang() -> Callable[[str, Path], str]:
    """Return `locate`."""
    return locate


@dataclass(frozen=True)
class Exports:
    """The exports of one module's tests, each in a folder of its name."""

    folder: Path

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
        out = Path(tempfile.mkdtemp(prefix="computed-", dir=self.folder.parent))
        (out / "request.json").write_text(json.dumps(request))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [python, str(script), target, str(out / "request.json"), str(port), str(out)]
        command += map(str, sorted(self.folder.iterdir()))
        env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(SGLANG)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return lambda name: load_file(out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    """Return a toy target whose head is not its embedding."""
    path = tmp_path_factory.mktemp("target") / "model"
    save_toy_target(path, tie_word_embeddings=False)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return a place for exports, empty at first."""
    return Exports(tmp_path_factory.mktemp("exports"))


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
