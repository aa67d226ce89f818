"""SGLang's own classes draft from an export what the reference loop drafts, on a CPU."""

from __future__ import annotations

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
TERMS = 2 * (6 * 32 + 64) + 6 * (32 + 20) + 64  # two layers, six steps of the GRU, the correction
OPTIONS = {"name": "domino", "layers": [1, 3], "num_layers": 2, "block_size": 6}
OPTIONS |= {"gru_hidden_dim": 20, "emb_dim": 12, "export_dtype": "float32"}
LAYOUTS = ["next_token", "same_position"]
Tensors = dict[str, Tensor]


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
    info = load_target_info(target)
    for layout in LAYOUTS:
        raw = {"target": {"path": target.path}, "strategy": {**OPTIONS, "label_layout": layout}}
        run, strategy = validate(raw, layout)
        draft: Any = strategy.draft(run.strategy, info, None)
        for name, weight in draft.model.named_parameters():
            if "norm" in name:  # norms of ones would hide their order
                weight.data = 1 + 0.3 * torch.randn(weight.shape, generator=draw)
            elif "backbone" not in name:  # a correction that decides about tokens
                size = 0.5 if "embed_proj" in name else 3.0
                weight.data = size * torch.randn(weight.shape, generator=draw)
        write_export(
            strategy.export(run.strategy, draft, info, "sglang"), exports.folder / layout, {}
        )
        found[layout] = reference(draft, strategy.proposer(run.strategy, draft, info), prefix)
    for mistake in MISTAKES:
        exports.plant(LAYOUTS[0], mistake)
    return found


def reference(draft: Any, proposer: Any, prefix: Any) -> Tensors:
    """Return the block's states, the chain, and its corrections."""
    features = torch.cat([prefix.hidden_states[i] for i in (1, 3)], dim=-1)
    states: list[Tensor] = []
    corrections: list[Tensor] = []
    model = draft.model
    model.backbone.register_forward_hook(lambda _m, _i, out: states.append(out[0]))
    model.embed_proj[2].register_forward_hook(lambda _m, _i, out: corrections.append(out))
    proposer.start(prefix)
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    tokens = proposer.propose(LAST, 99, greedy).tokens
    told = {"features": features, "states": states[0], "tokens": tokens}
    return told | {"corrections": torch.stack(corrections)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_drafts_the_same(
    engine: Callable[[str], Tensors], references: dict[str, Tensors], layout: str
) -> None:
    want, found = references[layout], engine(layout)
    assert found.keys() == want.keys()
    assert len(want["tokens"]) == 5
    assert want["corrections"].std() > 0.1
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
    found = engine(f"{LAYOUTS[0]}-{mistake.__name__}-wrong")["corrections"]
    assert float((found - references[LAYOUTS[0]]["corrections"]).abs().max()) > 1e-2
