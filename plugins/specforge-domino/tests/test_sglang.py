"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.types import Sampling

from ...dflash_kit import IDS as IDS, LAST as LAST, Tensors, export_drafts, same

pytestmark = pytest.mark.slow
TERMS = 2 * (6 * 32 + 64) + 6 * (32 + 20) + 64  # two layers, six steps of the GRU, the correction
OPTIONS = {"name": "domino", "block_size": 6, "gru_hidden_dim": 20, "emb_dim": 12}
LAYOUTS = {"next_token": {"sliding_window": 4}, "same_position": {}}


def shift_label(config: dict[str, Any], _weights: Tensors) -> None:
    config["dflash_config"]["shift_label"] = not config["dflash_config"]["shift_label"]


def gate_order(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the GRU's update gate before its reset gate."""
    reset, update, new = weights["prefix_gru.weight_hh_l0"].chunk(3)
    weights["prefix_gru.weight_hh_l0"] = torch.cat([update, reset, new])


def input_order(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the GRU's state before the slot's."""
    slot, state = weights["embed_proj.0.weight"].split([32, 20], dim=1)
    weights["embed_proj.0.weight"] = torch.cat([state, slot], dim=1)


MISTAKES = (shift_label, gate_order, input_order)


@pytest.fixture(scope="module")
def references(target: TargetConfig, exports: Any) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    drafts = {name: {**OPTIONS, **more, "label_layout": name} for name, more in LAYOUTS.items()}
    found = export_drafts(target, exports, drafts, vary, reference)
    for mistake in MISTAKES:
        exports.plant("next_token", mistake)
    return found


def vary(name: str, weight: Tensor, draw: torch.Generator) -> None:
    """Norms of ones would hide their order; the correction decides about tokens."""
    if "norm" in name:
        weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=draw))
    elif "backbone" not in name:
        size = 0.5 if "embed_proj" in name else 3.0
        weight.copy_(size * torch.randn(weight.shape, generator=draw))


def reference(_config: Any, draft: Any, _prefix: Any, proposer: Any) -> Tensors:
    """Return the block's states, the chain, and its corrections."""
    states: list[Tensor] = []
    corrections: list[Tensor] = []
    model = draft.model
    model.backbone.register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    model.embed_proj[2].register_forward_hook(lambda _m, _i, out: corrections.append(out))
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    return {"states": states[0], "tokens": tokens, "corrections": torch.stack(corrections)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], layout: str
) -> None:
    want, found = references[layout], engine(layout)
    assert len(want["tokens"]) == 5
    assert want["corrections"].std() > 0.1
    same(found, want, TERMS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found = engine(f"next_token-{mistake.__name__}-wrong")["corrections"]
    assert float((found - references["next_token"]["corrections"]).abs().max()) > 1e-2
