"""The options of the DSpark strategy: those of its DFlash backbone, and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from specforge_dflash.config import DFlashConfig, LabelLayout, Weight

from specforge_core.config import MayChange


class DSparkConfig(DFlashConfig):
    """The `strategy:` section of a DSpark run."""

    until_gap: ClassVar[bool] = True
    reads_final: ClassVar[bool] = True

    block_size: int = Field(
        7, ge=2, le=1024, description="Slots of one block, the known token included."
    )
    label_layout: LabelLayout = Field(
        "next_token", description="Slot k predicts token a+k+1 (k >= 0), or a+k (k >= 1)."
    )
    markov_head: Literal["vanilla", "gated", "rnn"] = Field(
        "vanilla", description="What corrects a slot by the token drafted before it."
    )
    markov_rank: int = Field(256, gt=0, le=10**5, description="Width of the Markov head.")
    confidence_head: bool = Field(
        True, description="Predict how likely each drafted token is accepted."
    )
    confidence_with_markov: bool = Field(
        True, description="The confidence head also reads the token before, as the Markov head."
    )
    ce_weight: Weight = Field(0.1, description="Of the cross-entropy against the data's tokens.")
    tv_weight: Weight = Field(
        0.9, description="Of the sum of |p - q| against the target's distribution."
    )
    confidence_weight: Annotated[float, MayChange.AT_START] = Field(
        1.0, gt=0, le=1e6, description="Of the confidence head's binary cross-entropy."
    )
    confidence_threshold: Annotated[float, MayChange.ALWAYS] = Field(
        0.0, ge=0, lt=1, description="Eval drafts while all tokens so far are kept so probably."
    )
    record_confidence: Annotated[Path | None, MayChange.ALWAYS] = Field(
        None, description="Eval appends each draft's confidence and what was accepted: JSON lines."
    )
    calibration: Annotated[Path | None, MayChange.ALWAYS] = Field(
        None, description="Such a record: eval and export fit the confidences' temperatures to it."
    )

    @model_validator(mode="after")
    def _heads_agree(self) -> DSparkConfig:
        if self.ce_weight == self.tv_weight == 0:
            raise ValueError("ce_weight and tv_weight are both 0: no token would be learned")
        if not self.confidence_head:
            for name in ("confidence_threshold", "record_confidence", "calibration"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs confidence_head: true")
        return self

    @property
    def gamma(self) -> float:
        """The decay constant of the slots' weights: 4, as published."""
        return 4.0 if self.decay_gamma is None else self.decay_gamma
