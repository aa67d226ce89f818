"""Every tensor of an export is used by SGLang's own class, and none of its parameters is left."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from specforge_sglang.child import free_port

from specforge_core.drafts.load import export_checkpoint
from specforge_core.errors import ConfigError
from specforge_core.load import load_config
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
DFLASH = {"name": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 16}
EAGLE3 = {"name": "eagle3", "layers": [0, 2, 4], "draft_vocab_size": 100}


@pytest.fixture
def load(sglang_python: str, toy_target: Path, tmp_path: Path) -> Any:
    """Return a function that trains one step, exports, and loads the export in SGLang."""

    def run(format: str = "sglang", **strategy: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "target": {"path": str(toy_target)},
            "strategy": strategy,
            "data": {"train": [str(write_conversations(tmp_path / "train.jsonl", 4))]},
            "output_dir": str(tmp_path / "run"),
            "train": {"max_steps": 1, "device": "cpu"},
        }
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(raw))
        train(*load_config(config))
        export = export_checkpoint(tmp_path / "run", format, tmp_path / "export", force=False)
        described = json.loads((export / "config.json").read_text())
        if described["architectures"] == ["Eagle3Qwen3ForCausalLM"]:
            described["architectures"] = ["LlamaForCausalLMEagle3"]  # SGLang has only this one
            (export / "config.json").write_text(json.dumps(described))
        port = str(free_port())
        command = [sglang_python, str(HERE / "export_keys.py"), str(export), port]
        env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
        env.pop("PYTHONPATH", None)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    return run


def test_dflash(load: Any) -> None:
    told = load(**DFLASH)
    assert told["class"] == "DFlashDraftModel"
    assert (told["ignored"], told["missing"]) == ([], [])


def test_eagle3(load: Any) -> None:
    pytest.importorskip("specforge_eagle3", reason="specforge-eagle3 is not installed")
    told = load(**EAGLE3)
    assert told["class"] == "LlamaForCausalLMEagle3"
    # t2d is for other engines; the embedding is taken from the target when it serves
    assert (told["ignored"], told["missing"]) == (["t2d"], ["model.embed_tokens.weight"])
    draft = told["draft_tokens"]
    assert draft == sorted(set(draft))


def test_what_is_refused_would_be_left_out(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("specforge_eagle3", reason="specforge-eagle3 is not installed")
    told = load("hf", **EAGLE3, layer_type="qwen3")
    norms = [f"midlayer.self_attn.{name}_norm.weight" for name in ("k", "q")]
    assert sorted(told["ignored"]) == [*norms, "t2d"]
    with pytest.raises(ConfigError, match="without norms on queries and keys"):
        export_checkpoint(tmp_path / "run", "sglang", tmp_path / "refused", force=False)
