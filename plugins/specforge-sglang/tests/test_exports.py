"""Every tensor of an export is used by SGLang's own class, and none of its parameters is left."""

from __future__ import annotations

import json
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
EAGLE3 = {"name": "eagle3", "layers": [0, 2, 4], "draft_vocab_size": 100}
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {  # the format, and the strategy
    "dflash": ("sglang", {"name": "dflash", "block_size": 4, "num_layers": 2, "num_anchors": 16}),
    "eagle3": ("sglang", EAGLE3),
    "qwen3": ("hf", {**EAGLE3, "layer_type": "qwen3"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    """Train each draft for one step, to FOLDER/NAME/run, and export it to FOLDER/NAME/export."""
    pytest.importorskip("specforge_eagle3", reason="specforge-eagle3 is not installed")
    folder = tmp_path_factory.mktemp("exports")
    data = write_conversations(folder / "train.jsonl", 4)
    for name, (format, strategy) in DRAFTS.items():
        raw: dict[str, Any] = {
            "target": {"path": str(toy_target)},
            "strategy": strategy,
            "data": {"train": [str(data)]},
            "output_dir": str(folder / name / "run"),
            "train": {"max_steps": 1, "device": "cpu"},
        }
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(raw))
        train(*load_config(config))
        export = export_checkpoint(
            folder / name / "run", format, folder / name / "export", force=False
        )
        described = json.loads((export / "config.json").read_text())
        if described["architectures"] == ["Eagle3Qwen3ForCausalLM"]:
            described["architectures"] = ["LlamaForCausalLMEagle3"]  # SGLang has only this one
            (export / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path, sglang_python: str, sglang_forks: Any) -> dict[str, dict[str, Any]]:
    """What a version of SGLang says of each export, all in one process."""
    paths = [str(folder / name / "export") for name in DRAFTS]
    out = sglang_forks.run(sglang_python, HERE / "export_keys.py", str(free_port()), *paths)
    return dict(zip(DRAFTS, json.loads(out.splitlines()[-1]), strict=True))


def test_dflash(loaded: dict[str, dict[str, Any]]) -> None:
    told = loaded["dflash"]
    assert told["class"] == "DFlashDraftModel"
    assert (told["ignored"], told["missing"]) == ([], [])


def test_eagle3(loaded: dict[str, dict[str, Any]]) -> None:
    told = loaded["eagle3"]
    assert told["class"] == "LlamaForCausalLMEagle3"
    # t2d is for other engines; the embedding is taken from the target when it serves
    assert (told["ignored"], told["missing"]) == (["t2d"], ["model.embed_tokens.weight"])
    draft = told["draft_tokens"]
    assert draft == sorted(set(draft))


def test_what_is_refused_would_be_left_out(
    loaded: dict[str, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    norms = [f"midlayer.self_attn.{name}_norm.weight" for name in ("k", "q")]
    assert sorted(loaded["qwen3"]["ignored"]) == [*norms, "t2d"]
    with pytest.raises(ConfigError, match="without norms on queries and keys"):
        export_checkpoint(folder / "qwen3" / "run", "sglang", tmp_path / "refused", force=False)
