"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specforge_lilicorr.lattice import Vectors
from specforge_lilicorr.model import candidates
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.types import Sampling

from ...dflash_kit import IDS as IDS, LAST as LAST, Tensors, export_drafts, same

pytestmark = pytest.mark.slow
TERMS = 2 * (6 * 32 + 64 + 4 * 34) + 2 * (4 * 32 + 80) + 5 * 32  # backbone, lattice, vectors
OPTIONS = {"name": "lilicorr", "lattice_heads": 2, "factor_dim": 12}
DRAFTS: dict[str, dict[str, Any]] = {
    "narrow": {
        "block_size": 6,
        "candidate_top_k": 4,
        "lattice_hidden_size": 16,
        "sliding_window": 4,
    },
    "convolved": {
        "block_size": 8,
        "candidate_top_k": 16,
        "lattice_hidden_size": 0,
        "lattice_layers": 1,
        "conv_kernel_size": 2,
        "conv_group_size": 16,
        "vector_eps": 2.0,  # so large that it matters
    },
}


def heads(_config: dict[str, Any], weights: Tensors) -> None:
    out, into = "lilicorr.out_head.weight", "lilicorr.in_head.weight"
    weights[out], weights[into] = weights[into], weights[out]


def distance(_config: dict[str, Any], weights: Tensors) -> None:
    """Count distances from the other slot."""
    key = "lilicorr.relative_slot_bias"
    weights[key] = weights[key].flip(1).contiguous()


def factors(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the anchor before the candidate."""
    key = "lilicorr.factor_input_proj.weight"
    own, anchor, both = weights[key].chunk(3, dim=1)
    weights[key] = torch.cat([anchor, own, both], dim=1)


def ratio(config: dict[str, Any], _weights: Tensors) -> None:
    config["dflash_config"]["lilicorr_logit_scale"] = 5.0


MISTAKES = (heads, distance, factors, ratio)


@pytest.fixture(scope="module")
def references(target: TargetConfig, exports: Any) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    drafts = {name: {**OPTIONS, **options} for name, options in DRAFTS.items()}
    found = export_drafts(target, exports, drafts, vary, reference)
    for mistake in MISTAKES:
        exports.plant("narrow", mistake)
    return found


def vary(name: str, weight: Tensor, draw: torch.Generator) -> None:
    if "norm" in name or "conv" in name or "lilicorr" in name:
        weight += 0.2 * torch.randn(weight.shape, generator=draw)


def reference(config: Any, draft: Any, prefix: Any, proposer: Any) -> Tensors:
    """Return the block's states, candidates, all scores, and the walk."""
    block: list[Tensor] = []
    draft.model.backbone.register_forward_hook(lambda _m, _i, out: block.append(out[0]))
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    states = block[0][None, 1:]
    labels = torch.zeros(states.shape[:2], dtype=torch.int64)
    _, _, ids, log_probs = candidates(states, labels, draft.frozen, config)
    told = {"states": block[0], "tokens": tokens, "candidates": ids[0], "log_probs": log_probs[0]}
    last = torch.cat([prefix.hidden_states[i][-1:] for i in (1, 3)], dim=-1)
    context = draft.model.backbone.context(last)
    for name, there in (("", True), ("first_", False)):
        vectors: Vectors = draft.model.lilicorr(
            draft.frozen.embed(ids), log_probs, states, context, torch.tensor([there])
        )
        outs, ins = vectors.outs[0], vectors.ins[0]
        told[f"{name}start"] = config.logit_scale * (ins[0] @ vectors.anchors[0])
        told[f"{name}pairs"] = config.logit_scale * (outs[:-1] @ ins[1:].transpose(1, 2))
    return told


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], name: str
) -> None:
    want, found = references[name], engine(name)
    assert not torch.equal(want["tokens"], want["candidates"][:, 0])  # else the lattice did nothing
    assert not torch.equal(want["start"], want["first_start"])
    same(found, want, TERMS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found = engine(f"narrow-{mistake.__name__}-wrong")["pairs"]
    assert float((found - references["narrow"]["pairs"]).abs().max()) > 1e-2
