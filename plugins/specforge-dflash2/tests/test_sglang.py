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
TERMS = 2 * (6 * 32 + 64 + 4 * 34) + 32 + 12  # two layers, their convolutions, the selector
DRAFTS: dict[str, dict[str, Any]] = {
    "published": {"name": "dflash2", "block_size": 8, "conv_group_size": 16, "selector_top_k": 16},
    "other": {
        "name": "dflash2",
        "block_size": 6,  # no power of two
        "conv_kernel_size": 3,
        "conv_group_size": 4,
        "selector_top_k": 4,
        "selector_rank": 12,
        "output_multiplier": 0.5,
        "sliding_window": 4,
    },
}


def taps(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the farthest slot's kernel first."""
    key = "layers.0.attention_conv.base_kernel"
    weights[key] = weights[key].flip(1).contiguous()


def sides(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the deltas behind the sublayer before those in front of it."""
    key = "layers.1.mlp_conv.kernel_projection.weight"
    weights[key] = torch.cat(weights[key].chunk(2)[::-1])


def codebooks(_config: dict[str, Any], weights: Tensors) -> None:
    before, after = (f"candidate_selector.{n}_codebook" for n in ("predecessor", "successor"))
    weights[before], weights[after] = weights[after], weights[before]


def multiplier(config: dict[str, Any], _weights: Tensors) -> None:
    config["dflash_config"]["output_multiplier"] = 1.0


MISTAKES = (taps, sides, codebooks, multiplier)


@pytest.fixture(scope="module")
def references(target: TargetConfig, exports: Any) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    found = export_drafts(target, exports, DRAFTS, vary, reference, {"other": 3.0})
    for mistake in MISTAKES:
        exports.plant("other", mistake)
    return found


def vary(name: str, weight: Tensor, draw: torch.Generator) -> None:
    """A selector decides about tokens."""
    if "norm" in name or "conv" in name or "selector" in name:
        weight += (1.0 if "selector" in name else 0.3) * torch.randn(weight.shape, generator=draw)


def reference(_config: Any, draft: Any, _prefix: Any, proposer: Any) -> Tensors:
    """Return the block's states, candidates, scores behind each candidate before, and the walk."""
    block: list[Tensor] = []
    draft.model.backbone.register_forward_hook(lambda _m, _i, out: block.append(out[0]))
    ids, logits, states = proposer.lattice(LAST)
    select, top_k = draft.model.candidate_selector, ids.shape[1]
    scores = []
    for slot in range(len(ids)):
        before = torch.full((top_k,), LAST) if slot == 0 else ids[slot - 1]
        row = (x[slot].expand(top_k, -1) for x in (states, ids, logits))
        state, candidates, own = row
        scores.append(select(state, before, candidates, own))
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    told = {"states": block[0], "candidates": ids, "scores": torch.stack(scores)}
    return told | {"tokens": proposer.propose(LAST, 99, greedy).tokens}


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], name: str
) -> None:
    want, found = references[name], engine(name)
    assert not torch.equal(want["tokens"], want["candidates"][:, 0])  # else nothing was selected
    same(found, want, TERMS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found = engine(f"other-{mistake.__name__}-wrong")["scores"]
    assert float((found - references["other"]["scores"]).abs().max()) > 1e-2
