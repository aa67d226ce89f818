"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
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
TERMS = 2 * (6 * 32 + 64) + 6 * (32 + 2 * 12) + 12 + 32  # two layers, six recurrent steps, heads
OPTIONS = {"name": "dspark", "layers": [1, 3], "num_layers": 2, "export_dtype": "float32"}
OPTIONS |= {"block_size": 6, "markov_rank": 12}
DRAFTS: dict[str, dict[str, Any]] = {
    "vanilla": {"confidence_with_markov": False},
    "gated": {"markov_head": "gated", "label_layout": "same_position"},
    "rnn": {"markov_head": "rnn", "calibration": "record.jsonl"},
}
Tensors = dict[str, Tensor]


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
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    path = tmp_path_factory.mktemp("target") / "model"
    save_toy_target(path, tie_word_embeddings=False)
    return TargetConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def references(
    target: TargetConfig, exports: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensors]:
    """Export drafts, some with mistakes; return what the drafts compute here."""
    record = tmp_path_factory.mktemp("record") / "record.jsonl"
    logits = torch.linspace(-1, 3, 6).tolist()
    record.write_text("".join(f'{{"logits": {logits}, "accepted": {n}}}\n' for n in (0, 1, 3, 6)))
    ids = torch.tensor(IDS)
    engine = TransformersEngine.load(target, torch.device("cpu"))
    (prefix,) = engine.capture(
        [Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))],
        CaptureSpec(layers=(1, 3), final="none", fields={}),
    )
    engine.close()
    found, draw = {}, torch.Generator().manual_seed(3)
    info = load_target_info(target)
    for name, options in DRAFTS.items():
        given = options | ({"calibration": str(record)} if "calibration" in options else {})
        raw = {"target": {"path": target.path}, "strategy": {**OPTIONS, **given}}
        run, strategy = validate(raw, name)
        draft: Any = strategy.draft(run.strategy, info, None)
        for key, weight in draft.model.named_parameters():
            if "norm" in key:  # norms of ones would hide their order
                weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=draw)
            elif "backbone" not in key:  # heads that decide about tokens
                size = 0.3 if "proj" in key else 1.0
                weight.data = size * torch.randn(weight.shape, generator=draw)
        export = strategy.export(run.strategy, draft, info, "sglang")
        write_export(export, exports.folder / name, {})
        proposer = strategy.proposer(run.strategy, draft, info)
        sts = exports.folder / name / "sts.json"
        temperatures = json.loads(sts.read_text())["temperatures"] if sts.exists() else [1.0]
        found[name] = reference(draft, proposer, prefix, torch.tensor(temperatures))
    for mistake in MISTAKES:
        exports.plant("rnn", mistake)
    return found


def reference(draft: Any, proposer: Any, prefix: Any, temperatures: Tensor) -> Tensors:
    """Return the block's states, the chain, its logits and its calibrated confidences."""
    model, block = draft.model, []
    model.backbone.register_forward_hook(lambda _m, _i, out: block.append(out[0]))
    proposer.start(prefix)
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    states = block[0][-len(tokens) :]
    before = model.markov_head.markov_w1(torch.tensor([LAST, *tokens[:-1].tolist()]))
    latents = model.markov_head(before[None], states[None])[0]
    logits = draft.frozen.base_logits(states) + model.markov_head.markov_w2(latents)
    raw = model.confidence_head(states, before)
    features = torch.cat([prefix.hidden_states[i] for i in (1, 3)], dim=-1)
    told = {"features": features, "states": block[0], "tokens": tokens, "logits": logits}
    told["confidences"] = torch.sigmoid(raw / temperatures)
    return {name: value.detach() for name, value in told.items()}


@pytest.mark.parametrize("name", DRAFTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], name: str
) -> None:
    want, found = references[name], engine(name)
    assert found.keys() == want.keys()
    assert len(want["tokens"]) == (5 if name == "gated" else 6)
    assert want["confidences"].std() > 0.01
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
    found = engine(f"rnn-{mistake.__name__}-wrong")["logits"]
    assert float((found - references["rnn"]["logits"]).abs().max()) > 1e-2
