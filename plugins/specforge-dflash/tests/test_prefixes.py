"""Blocks that begin with more known tokens than one: drawn, drafted behind, and who serves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specforge_dflash import DFlashStep, specforge_proposer
from specforge_dflash.proposer import DFlashProposer
from torch import Tensor

from specforge_core.errors import ConfigError
from specforge_core.types import TargetCapture


def test_prefixes_are_drawn_with_the_wanted_odds(kit: Any) -> None:
    """Short ones more often, as base^l from the least on; the same in any batch."""
    config = kit.config(block_size=5, variable_prefix=2, num_anchors=4000)
    (sample,) = kit.samples((5000,))
    (drawn,) = kit.draw(config, [sample])
    counts = drawn["prefixes"].bincount(minlength=5).double()
    wanted = torch.tensor([0.0, 0.0, 1.0, 0.9, 0.81]) / 2.71 * len(drawn["prefixes"])
    assert counts[:2].tolist() == [0, 0]
    assert ((counts - wanted)[2:] ** 2 / wanted[2:]).sum() < 20  # 2 degrees of freedom: 1 in 20,000
    (plain,) = kit.draw(kit.config(num_anchors=4000), [sample])
    assert torch.equal(plain["anchors"], drawn["anchors"])


@pytest.mark.parametrize("layout", ["same_position", "next_token"])
def test_the_proposer_gets_accepted_behind_known_tokens_what_the_step_simulates(
    kit: Any, layout: str
) -> None:
    """Drafting with the cache, block by block; labels are what the draft says, in part."""
    tiny = kit.tiny(variable_prefix=1, label_layout=layout, block_size=5)
    layers, (sample,) = tiny.model.shape.capture_layers, kit.samples((30,))
    draft, ids = DFlashProposer(tiny.config, tiny.model, tiny.frozen), sample["input_ids"]

    def logits(a: int, known: int) -> Tensor:
        states = sample["hidden_states"][:a].split(24, dim=-1)
        draft.start(
            TargetCapture(
                index=0,
                input_ids=ids[:a],
                loss_mask=torch.zeros(a, dtype=torch.int64),
                hidden_states=dict(zip(layers, states, strict=True)),
            )
        )
        return draft.block_logits(*ids[a : a + known].tolist())

    for place in (8, 9, 10, 15, 21, 22):  # else next to nothing would be accepted
        ids[place] = logits(place - 1, 1)[0, :40].argmax()  # not the mask token
    (drawn,) = kit.draw(tiny.config, [sample])
    emitted, blocks, more = 0, 0, 0
    for a, known in zip(drawn["anchors"].tolist(), drawn["prefixes"].tolist(), strict=True):
        asked = [p < 30 and bool(sample["loss_mask"][p]) for p in range(a + known, a + 5)]
        asked += [a + 5 < 30 and bool(sample["loss_mask"][a + 5])] * (layout == "next_token")
        if not any(asked):
            continue
        found = logits(a, known).argmax(-1).tolist()
        assert len(found) == len(asked)
        right = [ok and ids[a + known + j] == found[j] for j, ok in enumerate(asked)]
        emitted, blocks = emitted + 1 + [*right, False].index(False), blocks + 1
        more += known > 1 and right[0]
    told = DFlashStep(tiny.config)(
        tiny.draft, kit.batch(tiny.config, [sample]), kit.context()
    ).metrics["acceptance_length"]
    assert (float(told.num), float(told.den)) == (emitted, blocks)
    assert emitted > blocks
    if layout == "same_position":
        assert more


def test_a_draft_that_never_drafts_alone_is_not_served_alone(kit: Any) -> None:
    for engine in ("sglang", "vllm"):
        with pytest.raises(ConfigError, match=r"trained behind 2 known tokens .* Try: --format hf"):
            kit.export(kit.tiny(variable_prefix=2), engine)
    assert kit.export(kit.tiny(variable_prefix=2)).serve == {}
    assert kit.export(kit.tiny(variable_prefix=1)).serve.keys() == {"sglang", "vllm"}
    tiny = kit.tiny(variable_prefix=2)
    with pytest.raises(ConfigError, match=r"Try: train with strategy.variable_prefix=1"):
        specforge_proposer(tiny.config, tiny.draft)
