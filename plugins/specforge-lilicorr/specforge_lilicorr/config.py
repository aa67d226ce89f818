"""The options of the LiLiCorr strategy: those of its DFlash backbone, and its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from specforge_dflash.config import Weight
from specforge_dflash2.config import ConvolvedConfig

from specforge_core.config import MayChange
from specforge_core.types import TargetInfo


class LiLiCorrConfig(ConvolvedConfig):
    """The `strategy:` section of a LiLiCorr run."""

    block_size: int = Field(
        16, ge=3, le=1024, description="Slots of one block, the known token included."
    )
    candidate_top_k: int = Field(
        8, ge=2, le=1024, description="Candidates of a slot, the most likely tokens of the head."
    )
    lattice_hidden_size: int = Field(
        1024, ge=0, le=10**5, description="Width of the lattice's layers; 0 is the draft's own."
    )
    lattice_layers: int = Field(2, gt=0, le=1024, description="Layers over all candidates.")
    lattice_heads: int = Field(8, gt=0, le=1024, description="Attention heads of such a layer.")
    lattice_mlp_ratio: float = Field(
        2.0, gt=0, le=64, description="Width of such a layer's MLP over that of the layer."
    )
    factor_dim: int = Field(
        1024, gt=0, le=10**5, description="Length of the vectors that score two candidates."
    )
    logit_scale: float = Field(8.0, gt=0, le=1e6, description="Scores are cosines times this.")
    vector_eps: float = Field(
        1e-4, gt=0, le=1e6, description="Vectors are divided by no less than this."
    )
    ce_weight: Weight = Field(
        0.25, description="Of the scores' cross-entropy, beside the head's with weight 1."
    )
    margin_weight: Weight = Field(
        0.0, description="Of what the true token's score lacks to `margin` above the others'."
    )
    margin: Annotated[float, MayChange.AT_START] = Field(
        2.0, gt=0, le=1e6, description="How far the true token's score is to be above the others'."
    )
    penalty_weight: Weight = Field(
        0.25, description="Of candidates that the target likes less; 0 captures no final."
    )
    conv_kernel_size: int = Field(
        0, ge=0, le=1024, description="Slots DFlash 2's convolutions see; 0 is without them."
    )
    conv_group_size: int = Field(
        0, ge=0, le=10**6, description="Channels whose kernels change together; 0 is without them."
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> LiLiCorrConfig:
        if not self.ce_weight + self.margin_weight + self.penalty_weight:
            raise ValueError(
                "ce_weight, margin_weight and penalty_weight are all 0: the lattice would not be "
                "trained. Set ce_weight=0.25, or use the strategy dflash"
            )
        if bool(self.conv_kernel_size) != bool(self.conv_group_size):
            raise ValueError(
                f"conv_kernel_size is {self.conv_kernel_size} and conv_group_size "
                f"{self.conv_group_size}: set both (2 and 16 as published) or neither"
            )
        return self

    @property
    def reads_final(self) -> bool:
        return self.penalty_weight > 0

    def check(self, target: TargetInfo) -> None:
        """Raise ConfigError when the options do not fit the target."""
        sizes = {"lattice_heads": self.lattice_hidden_size or target.hidden_size}
        if self.conv_group_size:
            sizes["conv_group_size"] = target.hidden_size
        self.check_sizes(target, "candidate_top_k", sizes)
