"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import write_export
from specforge_core.load import validate
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.info import load_target_info
from specforge_core.testing.close import close
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import CaptureSpec, Prompt, Sampling

pytestmark = pytest.mark.slow
IDS, LAST = [int(i) for i in torch.arange(23) * 37 % 250], 101
TERMS = 2 * (6 * 32 + 64 + 4 * 34) + 32 + 12  # two layers, their convolutions, the selector
OPTIONS = {"name": "dflash2", "layers": [1, 3], "num_layers": 2, "export_dtype": "float32"}
DRAFTS: dict[str, dict[str, Any]] = {
    "published": {"block_size": 8, "conv_group_size": 16, "selector_top_k": 16},
    "other": {
        "block_size": 6,  # no power of two
        "conv_kernel_size": 3,
        "conv_group_size": 4,
        "selector_top_k": 4,
        "selector_rank": 12,
        "output_multiplier": 0.5,
        "softcap": 3.0,
    },
}
Tensors = dict[str, Tensor]


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
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    path = tmp_path_factory.mktemp("target") / "model"
    save_toy_target(path, tie_word_embeddings=False)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def references(target: TargetConfig, exports: Any) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    ids = torch.tensor(IDS)
    engine = TransformersEngine.load(target, torch.device("cpu"))
    (prefix,) = engine.capture(
        [Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))],
        CaptureSpec(layers=(1, 3), final="none", fields={}),
    )
    engine.close()
    found, draw = {}, torch.Generator().manual_seed(3)
    for name, options in DRAFTS.items():
        given = {key: value for key, value in options.items() if key != "softcap"}
        raw = {"target": {"path": target.path}, "strategy": {**OPTIONS, **given}}
        run, strategy = validate(raw, name)
        info = load_target_info(target)
        cap = {"final_logit_softcapping": options.get("softcap")}
        info = replace(info, config={**info.config, **cap})
        draft: Any = strategy.draft(run.strategy, info, None)
        for key, weight in draft.model.named_parameters():
            size = 1.0 if "selector" in key else 0.3  # a selector that decides about tokens
            if "norm" in key or "conv" in key or "selector" in key:
                weight.data += size * torch.randn(weight.shape, generator=draw)
        export = strategy.export(run.strategy, draft, info, "sglang")
        write_export(export, exports.folder / name, {})
        proposer = strategy.proposer(run.strategy, draft, info)
        found[name] = reference(draft, proposer, prefix)
    for mistake in MISTAKES:
        exports.plant("other", mistake)
    return found


def reference(draft: Any, proposer: Any, prefix: Any) -> Tensors:
    """Return the block's states, candidates, scores behind each candidate before, and the walk."""
    block: list[Tensor] = []
    draft.model.backbone.register_forward_hook(lambda _m, _i, out: block.append(out[0]))
    proposer.start(prefix)
    ids, logits, states = proposer.lattice(LAST)
    select, top_k = draft.model.candidate_selector, ids.shape[1]
    scores = []
    for slot in range(len(ids)):
        before = torch.full((top_k,), LAST) if slot == 0 else ids[slot - 1]
        row = (x[slot].expand(top_k, -1) for x in (states, ids, logits))
        state, candidates, own = row
        scores.append(select(state, before, candidates, own).detach())
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    features = torch.cat([prefix.hidden_states[i] for i in (1, 3)], dim=-1)
    told = {"features": features, "states": block[0], "candidates": ids}
    told["scores"] = torch.stack(scores)
    return told | {"tokens": proposer.propose(LAST, 99, greedy).tokens}


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], name: str
) -> None:
    want, found = references[name], engine(name)
    assert found.keys() == want.keys()
    assert not torch.equal(want["tokens"], want["candidates"][:, 0])  # else nothing was selected
    for part, value in want.items():
        close(found[part], value, terms=TERMS, name=part)
        if value.is_floating_point():
            assert float((found[part] - value).abs().max() / value.abs().max()) < 1e-5, part


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_export_is_seen(
    engine: Callable[[str], Tensors],
    references: dict[str, Tensors],
    mistake: Callable[[dict[str, Any], Tensors], None],
) -> None:
    found = engine(f"other-{mistake.__name__}-wrong")["scores"]
    assert float((found - references["other"]["scores"]).abs().max()) > 1e-2
