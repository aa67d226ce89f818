"""Options, and what they come to for a target."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from specforge_eagle3.config import SINCE_0_1, Eagle3Config, capture_layers, draft_shape

from specforge_core.config import MayChange
from specforge_core.errors import ConfigError


@pytest.mark.parametrize(
    ("num_layers", "want"),
    [(36, (1, 17, 32)), (32, (1, 15, 28)), (30, (1, 14, 26)), (7, (1, 2, 3)), (64, (1, 31, 60))],
)
def test_default_layers_are_the_published_ones(kit: Any, num_layers: int, want: Any) -> None:
    assert capture_layers(kit.config(), num_layers) == want


def test_what_the_readme_advises_is_taken() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    found = [Eagle3Config.model_validate(block["strategy"]) for block in blocks]
    assert [(c.fc_norm, c.norm_output) for c in found] == [(False,) * 2, (True,) * 2, (False,) * 2]


def test_targets_that_are_too_small(kit: Any) -> None:
    with pytest.raises(ConfigError, match="a target of 3 layers is too small for a draft"):
        capture_layers(kit.config(layers=(0, 1, 2)), 3)
    for num_layers in (4, 5, 6):
        with pytest.raises(
            ConfigError, match=r"which do not increase\. Try: strategy\.layers="
        ) as e:
            capture_layers(kit.config(), num_layers)
        advice = eval(str(e.value).rsplit("=", 1)[1])
        assert capture_layers(kit.config(layers=tuple(advice)), num_layers) == tuple(advice)


@pytest.mark.parametrize("layers", [(1, 3, 7), (-1, 2, 3), (3, 2, 5), (2, 2, 5)])
def test_a_layer_out_of_range_is_refused(kit: Any, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"within 0\.\.6 for a target of 8 layers\. Try: "):
        capture_layers(kit.config(layers=layers), 8)


def test_a_draft_vocabulary_beyond_the_targets(kit: Any) -> None:
    with pytest.raises(ConfigError, match=r"draft_vocab_size 30 is larger .* vocabulary of 29"):
        draft_shape(kit.config(draft_vocab_size=30), kit.target())
    assert draft_shape(kit.config(draft_vocab_size="full"), kit.target()).draft_vocab_size == 29
    assert draft_shape(kit.config(draft_vocab_size=29), kit.target()).full_vocab


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": 0}, "draft_vocab_size 0 must be above 0"),
        ({"vocab_map": "x", "draft_vocab_size": "full"}, "vocab_map has no effect"),
        ({"lk_decay": 2.0}, "lk_decay has no effect with loss 'kl'"),
        ({"lk_scale": 0.5, "loss": "lk_alpha"}, "lk_scale has no effect with loss 'lk_alpha'"),
        ({"layers": [1, 2]}, "layers"),
        ({"hard_until": 0.9}, "hard_until has no effect with hard_share 0"),
    ],
)
def test_options_that_do_not_agree(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kit.config(**options)


def test_heads_that_cannot_be_shared(kit: Any) -> None:
    with pytest.raises(ConfigError, match="4 attention heads cannot share 3 key/value heads"):
        draft_shape(kit.config(num_kv_heads=3), kit.target())


def test_a_section_that_0_1_stored_is_read_and_a_persons_is_not_mistaken_for_one() -> None:
    stored = Eagle3Config(name="eagle3").model_dump(mode="json")
    stored |= {"batches": "packed", "attention": "flash"}
    stored = {name: value for name, value in stored.items() if name not in SINCE_0_1}
    assert Eagle3Config.model_validate(stored) == Eagle3Config(name="eagle3")
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Eagle3Config.model_validate({"name": "eagle3", "batches": "padded"})


def test_what_may_change_is_what_does_not_make_the_draft() -> None:
    marked = {
        mark: {name for name, field in Eagle3Config.model_fields.items() if mark in field.metadata}
        for mark in MayChange
    }
    assert marked[MayChange.ALWAYS] == {
        *("layers", "attention", "head_chunk", "draft_length", "tree_top_k", "tree_tokens"),
        "export_dtype",
    }
    assert not {"draft_vocab_size", "vocab_map", "layer_type", "fc_norm", "rope_theta"} & {
        *marked[MayChange.ALWAYS],
        *marked[MayChange.AT_START],
    }
