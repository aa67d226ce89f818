"""The options of the Domino strategy: DFlash's, and those of the correction."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from specforge_dflash.config import DFlashConfig, LabelLayout

from specforge_core.config import MayChange


class DominoConfig(DFlashConfig):
    """The `strategy:` section of a Domino run."""

    label_layout: LabelLayout = Field(
        "next_token", description="Slot k predicts token a+k+1 (k >= 0), or a+k (k >= 1)."
    )
    num_anchors: Annotated[int, MayChange.AT_START] = Field(
        256, gt=0, le=10**6, description="Blocks trained per sample, at most."
    )
    gru_hidden_dim: int = Field(
        1024, gt=0, le=10**5, description="Size of the state that reads the tokens drafted so far."
    )
    emb_dim: int = Field(256, gt=0, le=10**5, description="Rank of the correction of the logits.")
    pure_draft_prefix_len: int = Field(
        1, ge=0, description="Drafted tokens at a block's start that are not corrected."
    )
    base_loss_decay: Annotated[float, MayChange.AT_START] = Field(
        1.0, gt=0, le=1, description="Part of the training in which bare logits leave the loss."
    )

    @model_validator(mode="after")
    def _something_is_corrected(self) -> DominoConfig:
        if self.pure_draft_prefix_len >= self.num_draft_tokens:
            raise ValueError(
                f"pure_draft_prefix_len {self.pure_draft_prefix_len} leaves none of the "
                f"{self.num_draft_tokens} drafted tokens to correct: make block_size larger"
            )
        return self

    @property
    def num_draft_tokens(self) -> int:
        """Tokens one block drafts in either layout: engines verify them and the known one."""
        return self.block_size - 1
