"""The options of the P-EAGLE strategy; what EAGLE-3 has too means the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from specforge_dflash.mask_token import mask_token
from specforge_eagle3.config import DraftShape, VocabularyOptions, shape_fields

from specforge_core.config import MayChange
from specforge_core.types import TargetInfo


class PeagleConfig(VocabularyOptions):
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
    attention: Annotated[Literal["auto", "eager"], MayChange.ALWAYS] = Field(
        "auto", description="auto: flex attention on a GPU, else eager."
    )
    draft_length: Annotated[int | None, MayChange.ALWAYS] = Field(
        None, gt=0, description="Tokens drafted, at most depths; all of them if not set."
    )

    @model_validator(mode="after")
    def _options_agree(self) -> PeagleConfig:
        if (self.draft_length or 0) > self.depths:
            raise ValueError(
                f"draft_length {self.draft_length} is more than the {self.depths} depths that "
                "are trained"
            )
        return self

    @property
    def draft_tokens(self) -> int:
        """Tokens of a draft."""
        return self.draft_length or self.depths


@dataclass(frozen=True, slots=True, kw_only=True)
class PeagleShape(DraftShape):
    """Everything about a draft's structure, resolved against one target."""

    mask_token_id: int

    def resolved(self) -> dict[str, Any]:
        """Return what options came to for the target, and no tensor's shape shows."""
        return {**DraftShape.resolved(self), "mask_token_id": self.mask_token_id}


def peagle_shape(config: PeagleConfig, target: TargetInfo) -> PeagleShape:
    """Resolve the options against the target.  Raises ConfigError when they do not fit it."""
    return PeagleShape(
        **shape_fields(config, target),
        num_layers=config.num_layers,
        mask_token_id=mask_token(config.mask_token_id, target),
    )
