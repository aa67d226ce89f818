"""Stock SGLang in a child process captures what transformers does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.verify import verify_directory
from specforge_core.capture.worker import run_capture
from specforge_core.config import load_config
from specforge_core.errors import SpecForgeError
from specforge_core.testing.toy import save_toy_target, write_conversations

PYTHON = os.environ.get("SPECFORGE_SGLANG_PYTHON")
CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.5,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_toy_target(tmp_path / "target", hidden_size=128, intermediate_size=256)
    data = write_conversations(tmp_path / "train.jsonl", 6)
    options = {"python": PYTHON, "env": {"SGLANG_USE_CPU_ENGINE": "1"}, "server_args": CPU}
    raw: dict[str, Any] = {
        "target": {
            "path": str(tmp_path / "target"),
            "dtype": "float32",
            "engine": "sglang",
            "options": options,
        },
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)], "capture_dir": str(tmp_path / "capture")},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="SPECFORGE_SGLANG_PYTHON names no SGLang environment")
def test_captures_equal_those_of_transformers(config: Path, tmp_path: Path) -> None:
    run_capture(*load_config(config))
    directory = tmp_path / "capture"
    manifest = CaptureManifest.read(directory)
    assert (manifest.num_samples, manifest.complete) == (6, True)
    again = load_config(config, ("target.engine=transformers", "target.options={}"))
    verify_directory(directory, *again, 6)


def test_an_interpreter_that_is_not_there_is_named(config: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "absent" / "python")
    with pytest.raises(SpecForgeError, match="absent"):
        run_capture(*load_config(config, (f"target.options.python={missing}",)))
    assert not (tmp_path / "capture" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.options.pithon=x", "pithon"),
        ("target.options.max_bytes=0", "max_bytes"),
        ("target.options.server_args.disable_radix_cache=false", "disable_radix_cache"),
    ],
)
def test_wrong_options_are_named(config: Path, override: str, message: str) -> None:
    with pytest.raises(SpecForgeError, match=message):
        run_capture(*load_config(config, (override,)))
