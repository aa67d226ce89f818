"""Options of the method, on top of DFlash's."""

from __future__ import annotations

from math import gcd
from typing import Annotated, Literal

from pydantic import Field, model_validator
from specforge_dflash.config import DFlashConfig

from specforge_core.config import MayChange
from specforge_core.errors import ConfigError
from specforge_core.types import TargetInfo


class DFlash2Config(DFlashConfig):
    """The `strategy:` section of a DFlash 2 run."""

    block_size: int = Field(
        8, ge=2, le=1024, description="Slots of one block, the known token included."
    )
    label_layout: Literal["same_position"] = Field(
        "same_position", description="Slot k predicts token a+k (k >= 1): the only one served."
    )
    conv_kernel_size: int = Field(
        2, gt=0, le=1024, description="Slots a convolution sees: its own and those before it."
    )
    conv_group_size: int = Field(
        16,
        gt=0,
        le=10**6,
        description="Channels whose kernels change together; divides the hidden size.",
    )
    selector_rank: int = Field(
        256, gt=0, le=10**5, description="Width of the selector's token tables."
    )
    selector_top_k: int = Field(
        16, ge=2, le=1024, description="Candidates of a slot, the most likely tokens of the head."
    )
    selector_weight: Annotated[float, MayChange.AT_START] = Field(
        1.0, ge=0, description="Of the selector's loss, beside the head's with weight 1."
    )
    detach_selector: Annotated[bool, MayChange.AT_START] = Field(
        False, description="Keep the selector's loss from training the layers too."
    )
    output_multiplier: float = Field(
        1.0, gt=0, description="The head's logits are multiplied by it, before a soft cap."
    )

    @model_validator(mode="after")
    def _taps_fit(self) -> DFlash2Config:
        if self.conv_kernel_size > self.block_size:
            raise ValueError(
                f"conv_kernel_size {self.conv_kernel_size} is more than the {self.block_size} "
                f"slots of a block: set conv_kernel_size={self.block_size}"
            )
        return self

    def check(self, target: TargetInfo) -> None:
        """Raise ConfigError when the options do not fit the target."""
        if target.hidden_size % self.conv_group_size:
            fits = gcd(target.hidden_size, self.conv_group_size)
            raise ConfigError(
                f"strategy.conv_group_size {self.conv_group_size} does not divide the target's "
                f"hidden size {target.hidden_size}. Try: strategy.conv_group_size={fits}"
            )
        if self.selector_top_k > target.vocab_size:
            raise ConfigError(
                f"strategy.selector_top_k {self.selector_top_k} is more than the target's "
                f"{target.vocab_size} tokens. Try: strategy.selector_top_k={target.vocab_size}"
            )
