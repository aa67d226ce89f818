"""The options of the P-EAGLE strategy; what EAGLE-3 has too means the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from specforge_dflash.config import DFlashConfig
from specforge_dflash.mask_token import mask_token
from specforge_eagle3.config import DraftShape, Eagle3Config, draft_shape

from specforge_core.config import MayChange
from specforge_core.nn.decoder import DecoderOptions
from specforge_core.types import TargetInfo


class PeagleConfig(DecoderOptions):
    """The `strategy:` section of a P-EAGLE run."""

    num_layers: int = Field(4, gt=0, le=64, description="Layers; the first reads embeddings too.")
    depths: Annotated[int, MayChange.AT_START] = Field(
        8, gt=0, le=64, description="Tokens drafted at once, in training."
    )
    keep_ratio: Annotated[float, MayChange.AT_START] = Field(
        0.8, gt=0, le=1, description="Depth d is trained at keep_ratio^d of the places."
    )
    keep_least: Annotated[float, MayChange.AT_START] = Field(
        0.2, ge=0, le=1, description="But at this part of them at least."
    )
    mask_token_id: int | None = Field(
        None, ge=0, description="A token that never occurs; found in the vocabulary if not set."
    )
    train_embedding: bool = Field(
        True, description="Train an embedding of the draft's own, or read the target's."
    )
    layers: Annotated[tuple[int, int, int] | None, MayChange.ALWAYS] = Field(
        None, description="Target layers whose outputs are read; EAGLE-3's formula if not set."
    )
    draft_vocab_size: int | Literal["full"] = Field(
        32000, description="Tokens the draft can draft: the most frequent supervised ones."
    )
    vocab_map: Path | None = Field(
        None, description="safetensors file, or exported draft, whose d2t and t2d to take instead."
    )
    loss: Annotated[Literal["kl", "lk_alpha", "lk_lambda"], MayChange.AT_START] = Field(
        "kl", description="Cross-entropy, -log of the acceptance rate, or a mix of both."
    )
    lk_decay: Annotated[float, MayChange.AT_START] = Field(
        3.0, ge=0, le=1e6, description="lk_lambda: w = lk_scale * exp(-lk_decay * a)."
    )
    lk_scale: Annotated[float, MayChange.AT_START] = Field(
        1.0, gt=0, le=1, description="lk_lambda: weight of KL where a is 0."
    )
    mask_on: Annotated[Literal["label", "input", "feature"], MayChange.AT_START] = Field(
        "label", description="Whose token must be supervised, as for EAGLE-3."
    )
    layer_type: Literal["llama", "qwen3"] = Field(
        "llama", description="qwen3 norms queries and keys."
    )
    train_head: Annotated[bool, MayChange.AT_START] = Field(
        True, description="Train the draft's head, or keep the target's rows."
    )
    attention: Annotated[Literal["auto", "eager"], MayChange.ALWAYS] = Field(
        "auto", description="auto: flex attention on a GPU, else eager."
    )
    head_chunk: Annotated[int, MayChange.ALWAYS] = Field(
        3584, gt=0, le=10**6, description="Rows whose logits exist at a time, about."
    )
    draft_length: Annotated[int | None, MayChange.ALWAYS] = Field(
        None, gt=0, description="Tokens drafted, at most depths; all of them if not set."
    )
    export_dtype: Annotated[Literal["bfloat16", "float16", "float32"], MayChange.ALWAYS] = Field(
        "bfloat16", description="Of the exported weights."
    )
    seed: Annotated[int, MayChange.AT_START] = Field(
        0, ge=0, le=2**32 - 1, description="Of the draft's first weights."
    )

    @model_validator(mode="after")
    def _options_agree(self) -> PeagleConfig:
        if (self.draft_length or 0) > self.depths:
            raise ValueError(
                f"draft_length {self.draft_length} is more than the {self.depths} depths that "
                "are trained"
            )
        _ = self.eagle3  # refuses what EAGLE-3 refuses
        return self

    @property
    def draft_tokens(self) -> int:
        """Tokens of a draft."""
        return self.draft_length or self.depths

    @property
    def eagle3(self) -> Eagle3Config:
        """The options that EAGLE-3 has too, as its own."""
        shared = type(self).model_fields.keys() & Eagle3Config.model_fields.keys()
        given = {name: getattr(self, name) for name in shared}
        return Eagle3Config.model_validate(
            given | {"name": "eagle3", "draft_length": self.draft_tokens}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeagleShape(DraftShape):
    """Everything about a draft's structure, resolved against one target."""

    num_layers: int
    mask_token_id: int

    def resolved(self) -> dict[str, Any]:
        """Return what options came to for the target, and no tensor's shape shows."""
        return {**DraftShape.resolved(self), "mask_token_id": self.mask_token_id}


def peagle_shape(config: PeagleConfig, target: TargetInfo) -> PeagleShape:
    """Resolve the options against the target.  Raises ConfigError when they do not fit it."""
    shared = draft_shape(config.eagle3, target)
    token = mask_token(DFlashConfig(name="dflash", mask_token_id=config.mask_token_id), target)
    return PeagleShape(
        **{field.name: getattr(shared, field.name) for field in fields(shared)},
        num_layers=config.num_layers,
        mask_token_id=token,
    )
