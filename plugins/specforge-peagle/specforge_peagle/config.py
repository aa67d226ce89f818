"""The options of the P-EAGLE strategy; what EAGLE-3 has too means the same."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from specforge_eagle3.config import VocabularyOptions

from specforge_core.config import MayChange


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
