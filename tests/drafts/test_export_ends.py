"""An export names every token that ends the target's answers, whoever knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import TargetConfig
from specforge_core.drafts.load import export_checkpoint
from specforge_core.target.info import load_target_info
from specforge_core.testing.runs import load, write_run
from specforge_core.testing.toy import save_toy_target, toy_tokenizer
from specforge_core.train.run import train

from .. import families

SMALL: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "num_layers": 1, "num_capture_layers": 2, "num_anchors": 8},
    "eagle3": {"steps": 1, "draft_vocab_size": "full"},
}
OWN = toy_tokenizer().eos_token_id


@pytest.mark.parametrize("strategy", sorted(SMALL))
@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(7, [8, 9], [7, 8, 9, OWN]), (None, None, OWN)],
)
def test_the_ends_of_all_sources_are_written(
    strategy: str,
    config: int | None,
    generation: list[int] | None,
    ends: Any,
    tmp_path: Path,
) -> None:
    save_toy_target(tmp_path / "target", eos_token_id=config, num_hidden_layers=8)
    told = {} if generation is None else {"eos_token_id": generation}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(told))
    run = write_run(
        tmp_path,
        tmp_path / "target",
        conversations=2,
        strategy={"name": strategy, **SMALL[strategy]},
        train={"max_steps": 1, "batch_size": 1, "compute_dtype": "float32"},
    )
    train(*load(run))
    export_checkpoint(tmp_path / "run", "hf", tmp_path / "out", force=False)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["eos_token_id"] == ends


def test_a_multimodal_config_names_its_ends_outside_of_its_text_part(tmp_path: Path) -> None:
    families.build("qwen2_5_vl").config.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["text_config"]["eos_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps({**told, "eos_token_id": 77}))
    info = load_target_info(TargetConfig(path=str(tmp_path)))
    assert info.config["eos_token_id"] == 77
