"""Options of the method, on top of DFlash's."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Annotated, Literal

from pydantic import Field, model_validator
from specforge_dflash.config import DFlashConfig, Weight

from specforge_core.config import MayChange
from specforge_core.errors import ConfigError
from specforge_core.types import TargetInfo


class ConvolvedConfig(DFlashConfig):
    """Base of a `strategy:` section whose DFlash layers can have convolutions."""

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

    @model_validator(mode="after")
    def _taps_fit(self) -> ConvolvedConfig:
        if self.conv_kernel_size > self.block_size:
            raise ValueError(
                f"conv_kernel_size {self.conv_kernel_size} is more than the {self.block_size} "
                f"slots of a block: set conv_kernel_size={self.block_size}"
            )
        return self

    def check_sizes(self, target: TargetInfo, top_k: str, divided: Mapping[str, int]) -> None:
        """Raise ConfigError when options do not fit the target.

        `top_k` names that of a slot's candidates, `divided` those that divide a size.
        """
        for name, size in divided.items():
            if size % (given := getattr(self, name)):
                raise ConfigError(
                    f"strategy.{name} {given} does not divide the width {size}. "
                    f"Try: strategy.{name}={gcd(size, given)}"
                )
        if (given := getattr(self, top_k)) > target.vocab_size:
            raise ConfigError(
                f"strategy.{top_k} {given} is more than the target's {target.vocab_size} tokens. "
                f"Try: strategy.{top_k}={target.vocab_size}"
            )


class DFlash2Config(ConvolvedConfig):
    """The `strategy:` section of a DFlash 2 run."""

    block_size: int = Field(
        8, ge=2, le=1024, description="Slots of one block, the known token included."
    )
    selector_rank: int = Field(
        256, gt=0, le=10**5, description="Width of the selector's token tables."
    )
    selector_top_k: int = Field(
        16, ge=2, le=1024, description="Candidates of a slot, the most likely tokens of the head."
    )
    selector_weight: Weight = Field(
        1.0, description="Of the selector's loss, beside the head's with weight 1."
    )
    detach_selector: Annotated[bool, MayChange.AT_START] = Field(
        False, description="Keep the selector's loss from training the layers too."
    )
    output_multiplier: float = Field(
        1.0, gt=0, le=1e6, description="The head's logits are multiplied by it, before a soft cap."
    )

    def check(self, target: TargetInfo) -> None:
        """Raise ConfigError when the options do not fit the target."""
        self.check_sizes(target, "selector_top_k", {"conv_group_size": target.hidden_size})
