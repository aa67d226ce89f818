"""What tests of methods around a DFlash backbone share: a tiny draft, its samples and batches.

And the frame of their comparison with SGLang's own classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from specforge_dflash import build_draft
from specforge_dflash.adapter import capture_spec, with_final
from specforge_dflash.anchors import DFlashTransform
from specforge_dflash.collate import DFlashCollate
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import write_export
from specforge_core.draws import draws_of
from specforge_core.load import validate
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import Head
from specforge_core.target.info import load_target_info
from specforge_core.target.measure import HeadScale
from specforge_core.testing.close import close
from specforge_core.types import (
    Batch,
    CaptureSpec,
    Draft,
    Prompt,
    Sample,
    StepContext,
    TargetCapture,
    TargetInfo,
)

HIDDEN = 24
TARGET_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
IDS, LAST = [int(i) for i in torch.arange(23) * 37 % 250], 101  # a text, and the token behind it
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """A draft, and what it was made of."""

    config: Any
    target: TargetInfo
    draft: Draft

    @property
    def model(self) -> Any:
        return self.draft.model

    @property
    def frozen(self) -> Any:
        return self.draft.frozen


def make_target(vocab: int, **overrides: Any) -> TargetInfo:
    """Return a tiny target of eight layers, which there is nothing of but its config."""
    return TargetInfo(
        name_or_path="tiny",
        revision=None,
        hidden_size=HIDDEN,
        num_layers=8,
        vocab_size=vocab,
        config={**TARGET_CONFIG, **overrides},
    )


def make_tiny(
    config: Any,
    extend: Callable[[Draft], Draft],
    vary: Callable[[str], float],
    *,
    vocab: int = 41,
    softcap: float | None = None,
    scale: float = 1.0,
    head_scale: float = 1.0,
    bias: bool = False,
    model_type: str = "tiny",
) -> Tiny:
    """A draft around random tensors, each parameter varied from its first value by some size."""
    target = make_target(vocab, final_logit_softcapping=softcap, model_type=model_type)
    gen = torch.Generator().manual_seed(1)
    embed, head = (torch.randn(vocab, HIDDEN, generator=gen) for _ in range(2))
    if bias:
        head = Head(weight=head, bias=2 * torch.randn(vocab, generator=gen)).joined()
    beside = HeadScale(scale=head_scale, softcap=softcap)
    draft = extend(
        build_draft(
            config, target, embed, head, scale=scale, beside=beside, mask_token_id=vocab - 1
        )
    )
    for name, weight in draft.model.named_parameters():
        if size := vary(name):
            weight.data += size * torch.randn(weight.shape, generator=gen)
    return Tiny(config, target, draft)


def make_samples(
    lengths: tuple[int, ...] = (19, 11, 6),
    seed: int = 2,
    *,
    vocab: int = 41,
    share: float = 0.7,
    sure: slice = slice(3, 5),
) -> list[Sample]:
    """Ragged samples; about `share` of each is supervised, with holes in it, and `sure` is."""
    gen = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        mask = (torch.rand(length, generator=gen) < share).to(torch.uint8)
        mask[sure] = 1
        ids = torch.randint(1, vocab - 1, (length,), generator=gen)
        features = torch.randn(length, 2 * HIDDEN, generator=gen)
        final = torch.randn(length, HIDDEN, generator=gen)
        tokens = {"input_ids": ids, "loss_mask": mask}
        samples.append({**tokens, "hidden_states": features, "final": final})
    return samples


def make_batch(config: Any, samples: Sequence[Sample], vocab: int = 41) -> Batch:
    """What the loader makes of samples: transform, then collate."""
    spec = with_final(capture_spec((1, 5), HIDDEN), HIDDEN)
    transform = DFlashTransform(spec, 10**6, config.num_anchors)
    drawn = [transform(s, draws_of(0, 0, i)) for i, s in enumerate(samples)]
    kept = [s for s in drawn if s is not None]
    return DFlashCollate(config, spec, vocab - 1)(kept)


def make_context(progress: float = 0.0, training: bool = True) -> StepContext:
    """Return the context of a step at such a part of the training."""
    mesh: Any = None
    generator = torch.Generator().manual_seed(0)
    where = {"step": 1, "total_steps": 9, "progress": progress}
    return StepContext(**where, generator=generator, training=training, mesh=mesh)


def captured(sample: Sample, start: int, end: int) -> TargetCapture:
    """What the target says of a part of a sample."""
    states = sample["hidden_states"][start:end].split(HIDDEN, dim=-1)
    ids = sample["input_ids"][start:end]
    return TargetCapture(
        index=0,
        input_ids=ids,
        loss_mask=torch.zeros_like(ids),
        hidden_states=dict(zip((1, 5), states, strict=True)),
    )


def block_states(model: Any, tiny: Tiny, features: Tensor, token: int, anchor: int) -> Tensor:
    """Final states [B, H] in float64 of the block that starts with `token` at `anchor`."""
    ids = torch.full((tiny.config.block_size,), len(tiny.frozen.embed_tokens) - 1)
    ids[0] = token
    slots = tiny.frozen.embed_tokens.double()[ids] * tiny.frozen.scale
    where = torch.tensor([[anchor]]), torch.tensor([[0]]), torch.arange(anchor)[None]
    found: Tensor = model.backbone(features[None, :anchor].double(), slots[None], *where)[0]
    return found


def head_product(tiny: Tiny, state: Tensor) -> Tensor:
    """The head's product with a state [H] in float64, and its bias where it has one."""
    head = tiny.frozen.lm_head.double()
    out = head[:, :HIDDEN] @ state
    return out + head[:, HIDDEN] if tiny.frozen.has_bias else out


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits behind a soft cap, where there is one."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def slot_weights(config: Any, gamma: float, losses: Sequence[float | None]) -> list[float]:
    """What one block's slots weigh, from their losses; None is a slot without a label."""
    if config.weighting == "decay":
        found = [math.exp(-k / gamma) for k in range(len(losses))]
    else:
        alpha = config.dpace_alpha
        smooth = [1.0 if x is None else (1 - alpha) * math.exp(-x) + alpha for x in losses]
        prefix = [math.prod(smooth[: k + 1]) for k in range(len(smooth))]
        there = [0.0 if x is None else p for p, x in zip(prefix, losses, strict=True)]
        suffix = [sum(there[k:]) for k in range(len(there))]
        found = {
            "uniform": [1.0] * len(losses),
            "dpace": suffix,
            "dpace_confidence": prefix,
            "dpace_continuation": [s / p for s, p in zip(suffix, prefix, strict=True)],
        }[config.weighting]
    return [0.0 if x is None else w for w, x in zip(found, losses, strict=True)]


# ---- what SGLang's own classes make of an export ---------------------------


def export_drafts(
    target: TargetConfig,
    exports: Any,
    drafts: Mapping[str, dict[str, Any]],
    vary: Callable[[str, Tensor, torch.Generator], None],
    reference: Callable[[Any, Any, TargetCapture, Any], Tensors],
    softcaps: Mapping[str, float] | None = None,
) -> dict[str, Tensors]:
    """Export drafts of these options, their weights varied; return what `reference` computes.

    It gets a draft's options, the draft, the target's view of IDS, and the started proposer.
    """
    ids = torch.tensor(IDS)
    engine = TransformersEngine.load(target, torch.device("cpu"))
    (prefix,) = engine.capture(
        [Prompt(index=0, input_ids=ids, loss_mask=torch.ones_like(ids))],
        CaptureSpec(layers=(1, 3), final="none", fields={}),
    )
    engine.close()
    found, draw, plain = {}, torch.Generator().manual_seed(3), load_target_info(target)
    shared = {"layers": [1, 3], "num_layers": 2, "export_dtype": "float32"}
    for name, options in drafts.items():
        raw = {"target": {"path": target.path}, "strategy": {**shared, **options}}
        run, strategy = validate(raw, name)
        cap = (softcaps or {}).get(name)
        info = replace(plain, config={**plain.config, "final_logit_softcapping": cap})
        draft: Any = strategy.draft(run.strategy, info, None)
        for key, weight in draft.model.named_parameters():
            vary(key, weight.data, draw)
        export = strategy.export(run.strategy, draft, info, "sglang")
        write_export(export, exports.folder / name, {})
        proposer: Any = strategy.proposer(run.strategy, draft, info)
        proposer.start(prefix)
        with torch.no_grad():
            told = reference(run.strategy, draft, prefix, proposer)
        features = torch.cat([prefix.hidden_states[i] for i in (1, 3)], dim=-1)
        found[name] = {"features": features, **told}
    return found


def same(found: Tensors, want: Tensors, terms: int) -> None:
    """Assert that an engine computed the same, to what rounding of `terms` sums explains."""
    assert found.keys() == want.keys()
    for part, value in want.items():
        close(found[part], value, terms=terms, name=part)
        if value.is_floating_point():
            assert float((found[part] - value).abs().max() / value.abs().max()) < 1e-5, part
