"""The recipes load, and are planned without a weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config

from specforge_core.load import load_config
from specforge_core.train.plan import plan_run

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"


@pytest.mark.parametrize(
    ("name", "nproc", "samples"), [("smollm2-eagle3", 1, 2), ("qwen3-8b-eagle3", 8, 16)]
)
def test_a_recipe_is_planned(tmp_path: Path, name: str, nproc: int, samples: int) -> None:
    Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, vocab_size=151936, num_attention_heads=32
    ).save_pretrained(tmp_path)
    run, strategy = load_config(RECIPES / f"{name}.yaml", (f"target.path={tmp_path}",))
    plan = yaml.safe_load(plan_run(run, strategy, nproc))["plan"]
    assert plan["strategy"] == "specforge-eagle3 0.2.0"
    assert plan["captures"] == {"layers": [1, 17, 32], "final": "post_norm"}
    assert plan["samples_per_step"] == samples
    assert plan["target"]["vocab_size"] == 151936
