"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specforge_dspark.confidence import calibrate, read
from specforge_dspark.model import base_logits
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.types import Sampling

from ...dflash_kit import IDS as IDS, LAST as LAST, Tensors, export_drafts, same

pytestmark = pytest.mark.slow
TERMS = 2 * (6 * 32 + 64) + 6 * (32 + 2 * 12) + 12 + 32  # two layers, six recurrent steps, heads
OPTIONS = {"name": "dspark", "block_size": 6, "markov_rank": 12}
DRAFTS: dict[str, dict[str, Any]] = {
    "vanilla": {"confidence_with_markov": False},
    "gated": {"markov_head": "gated", "label_layout": "same_position"},
    "rnn": {"markov_head": "rnn", "sliding_window": 4},  # and calibrated
}


def anchored(config: dict[str, Any], _weights: Tensors) -> None:
    """Draft from the anchor's slot, or not."""
    config["sample_from_anchor"] = not config["sample_from_anchor"]
    config["dflash_config"]["sample_from_anchor"] = config["sample_from_anchor"]


def parts(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the recurrent head's output before its gate."""
    keep, candidate, out = weights["markov_head.joint_proj.weight"].chunk(3)
    weights["markov_head.joint_proj.weight"] = torch.cat([out, candidate, keep])


def inputs(_config: dict[str, Any], weights: Tensors) -> None:
    """Put the recurrent head's token before its state."""
    state, token, slot = weights["markov_head.joint_proj.weight"].split([12, 12, 32], dim=1)
    weights["markov_head.joint_proj.weight"] = torch.cat([token, state, slot], dim=1)


MISTAKES = (anchored, parts, inputs)


@pytest.fixture(scope="module")
def references(
    target: TargetConfig, exports: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    record = tmp_path_factory.mktemp("record") / "record.jsonl"
    logits = torch.linspace(-1, 3, 6).tolist()
    record.write_text("".join(f'{{"logits": {logits}, "accepted": {n}}}\n' for n in (0, 1, 3, 6)))
    drafts = {name: {**OPTIONS, **options} for name, options in DRAFTS.items()}
    drafts["rnn"]["calibration"] = str(record)
    found = export_drafts(target, exports, drafts, vary, reference)
    for mistake in MISTAKES:
        exports.plant("rnn", mistake)
    return found


def vary(name: str, weight: Tensor, draw: torch.Generator) -> None:
    """Norms of ones would hide their order; heads decide about tokens."""
    if "norm" in name:
        weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=draw))
    elif "backbone" not in name:
        weight.copy_((0.3 if "proj" in name else 1.0) * torch.randn(weight.shape, generator=draw))


def reference(config: Any, draft: Any, _prefix: Any, proposer: Any) -> Tensors:
    """Return the block's states, the chain, its logits and its calibrated confidences."""
    model, block = draft.model, []
    model.backbone.register_forward_hook(lambda _m, _i, out: block.append(out[0]))
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    states = block[0][-len(tokens) :]
    before = model.markov_head.markov_w1(torch.tensor([LAST, *tokens[:-1].tolist()]))
    latents = model.markov_head(before[None], states[None])[0]
    raw, ones = model.confidence_head(states, before), [1.0]
    if config.calibration is not None:
        ones = calibrate(*read(config.calibration, len(tokens))).temperatures
    return {
        "states": block[0],
        "tokens": tokens,
        "logits": base_logits(states, draft.frozen) + model.markov_head.markov_w2(latents),
        "confidences": torch.sigmoid(raw / torch.tensor(ones)),
    }


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], name: str
) -> None:
    want, found = references[name], engine(name)
    assert len(want["tokens"]) == (5 if name == "gated" else 6)
    assert want["confidences"].std() > 0.01
    same(found, want, TERMS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found = engine(f"rnn-{mistake.__name__}-wrong")["logits"]
    assert float((found - references["rnn"]["logits"]).abs().max()) > 1e-2
