"""The options of the DFlash strategy, and what they come to for one target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import Field, model_validator

from specforge_core.config import MayChange
from specforge_core.errors import ConfigError
from specforge_core.nn.decoder import DecoderOptions, DecoderShape, decoder_fields
from specforge_core.types import TargetInfo

LayerType: TypeAlias = Literal["full_attention", "sliding_attention"]
LabelLayout: TypeAlias = Literal["same_position", "next_token"]
# of a method on DFlash's blocks
Config = TypeVar("Config", bound="DFlashConfig")
# of one of a loss's terms
Weight: TypeAlias = Annotated[float, MayChange.AT_START, Field(ge=0, le=1e6)]


class DFlashConfig(DecoderOptions):
    """What all methods on DFlash's blocks can be told, and variants of DFlash extend."""

    # nothing behind a block's first slot without a label is trained: nothing there is accepted
    until_gap: ClassVar[bool] = False

    block_size: int = Field(
        16, ge=2, le=1024, description="Slots of one block, the known token included."
    )
    num_layers: int = Field(5, gt=0, le=1024, description="Layers of the draft.")
    layers: Annotated[tuple[int, ...] | None, MayChange.ALWAYS] = Field(
        None, description="Target layers whose outputs are read; the published formula if not set."
    )
    num_capture_layers: Annotated[int | None, MayChange.ALWAYS] = Field(
        None, gt=0, le=1024, description="How many layers the formula picks; num_layers if not set."
    )
    num_anchors: Annotated[int, MayChange.AT_START] = Field(
        512, gt=0, le=10**6, description="Blocks trained per sample, at most."
    )
    batches: Annotated[Literal["packed", "padded"], MayChange.ALWAYS] = Field(
        "packed", description="Samples of a batch behind each other in one row, or one a row."
    )
    label_layout: LabelLayout = Field(
        "same_position", description="Slot k predicts token a+k (k >= 1), or a+k+1 (k >= 0)."
    )
    weighting: Annotated[
        Literal["decay", "uniform", "dpace", "dpace_confidence", "dpace_continuation"],
        MayChange.AT_START,
    ] = Field("decay", description="How slots are weighted within their block.")
    decay_gamma: Annotated[float | None, MayChange.AT_START] = Field(
        None,
        gt=0,
        le=1e6,
        description="Decay of the slots' weights; 7, 5, 4 for blocks of 16, 10, 8.",
    )
    dpace_alpha: Annotated[float, MayChange.AT_START] = Field(
        0.5, ge=0, le=1, description="Smoothing of D-PACE's confidence."
    )
    mask_token_id: Annotated[int | None, MayChange.ALWAYS] = Field(
        None, ge=0, description="Stands for the tokens to draft; an unused one if not set."
    )
    sliding_window: int | None = Field(
        None, gt=0, le=10**9, description="Positions a sliding layer sees."
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        None, description="One per draft layer; all sliding if only sliding_window is set."
    )
    attention: Annotated[Literal["auto", "flex", "eager"], MayChange.ALWAYS] = Field(
        "auto", description="auto: own kernels on a GPU, flex for what they do not take."
    )
    head_chunk: Annotated[int, MayChange.ALWAYS] = Field(
        1024, gt=0, le=10**6, description="Rows whose logits exist at a time."
    )
    export_dtype: Annotated[Literal["bfloat16", "float32"], MayChange.ALWAYS] = Field(
        "bfloat16", description="Of weights."
    )
    seed: Annotated[int, MayChange.AT_START] = Field(
        0, ge=0, le=2**32 - 1, description="Of the draft's first weights."
    )

    @model_validator(mode="after")
    def _options_agree(self) -> DFlashConfig:
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_layers:
                raise ValueError(
                    f"layer_types names {len(self.layer_types)} layers, num_layers is "
                    f"{self.num_layers}: give one type per layer"
                )
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                raise ValueError("layer_types has sliding_attention: set sliding_window")
        if self.decay_gamma is not None and self.weighting != "decay":
            raise ValueError(
                f"decay_gamma has no effect with weighting {self.weighting!r}: remove one of them"
            )
        return self

    @property
    def first_slot(self) -> int:
        """The first slot that is trained and drafted from."""
        return 1 if self.label_layout == "same_position" else 0

    @property
    def num_draft_tokens(self) -> int:
        """Tokens one block drafts: one fewer than its slots where slot 0 predicts nothing."""
        return self.block_size - self.first_slot

    @property
    def gamma(self) -> float:
        """The decay constant: lines through the published 4, 5 and 7 at blocks of 8, 10, 16."""
        if self.decay_gamma is not None:
            return self.decay_gamma
        return self.block_size / 2 if self.block_size <= 10 else 5 + (self.block_size - 10) / 3

    def check(self, target: TargetInfo) -> None:
        """Raise ConfigError when a method's own options do not fit the target."""

    @property
    def reads_final(self) -> bool:
        """Whether the final state, which the target's head reads, is captured too."""
        return False


class DFlashOptions(DFlashConfig):
    """The `strategy:` section of a DFlash run."""

    causal: bool = Field(
        False, description="Slots see only themselves and those before them in their block."
    )
    labels: Annotated[Literal["data", "target"], MayChange.AT_START] = Field(
        "data", description="A slot's label: the data's token, or the target's own likeliest."
    )
    loss: Annotated[Literal["ce", "kl"], MayChange.AT_START] = Field(
        "ce", description="Cross-entropy of the label, or KL divergence from the target's."
    )
    kl_temperature: Annotated[float, MayChange.AT_START] = Field(
        1.0, gt=0, le=1e3, description="kl: T divides both logits, the loss is multiplied by T^2."
    )

    variable_prefix: Annotated[int, MayChange.AT_START] = Field(
        0, ge=0, le=1023, description="Blocks begin with so many known tokens or more; 0: with 1."
    )
    prefix_weight_base: Annotated[float, MayChange.AT_START] = Field(
        0.9, gt=0, le=1, description="variable_prefix: l known tokens are as likely as this^l."
    )

    @model_validator(mode="after")
    def _objective_agrees(self) -> DFlashOptions:
        if self.loss == "kl" and self.weighting.startswith("dpace"):
            raise ValueError(
                f"weighting {self.weighting!r} weighs by what the label costs, which loss kl does "
                "not know: set weighting=uniform or decay"
            )
        if self.loss != "kl" and self.kl_temperature != 1:
            raise ValueError("kl_temperature has no effect with loss 'ce': remove it")
        if self.variable_prefix >= self.block_size:
            raise ValueError(
                f"variable_prefix {self.variable_prefix} leaves no slot of a block of "
                f"{self.block_size} to draft: set at most {self.block_size - 1}"
            )
        default = type(self).model_fields["prefix_weight_base"].default
        if not self.variable_prefix and self.prefix_weight_base != default:
            raise ValueError("prefix_weight_base has no effect with variable_prefix 0: remove it")
        return self

    @property
    def reads_final(self) -> bool:
        return self.loss == "kl"

    @property
    def prefix_weights(self) -> tuple[float, ...] | None:
        """How likely blocks begin with 1, 2, ... known tokens, up to a factor; None: all with 1."""
        least = self.variable_prefix
        if not least:
            return None
        counts = range(1, self.block_size)
        return tuple(self.prefix_weight_base ** (n - least) if n >= least else 0.0 for n in counts)


def objective(config: DFlashConfig) -> DFlashOptions:
    """Return the options of DFlash alone: of a config that has none of them their defaults."""
    if isinstance(config, DFlashOptions):
        return config
    return DFlashOptions.model_construct(name=config.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape(DecoderShape):
    """Everything about a draft's structure, resolved against one target."""

    num_layers: int
    block_size: int
    capture_layers: tuple[int, ...]
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    mask_token_id: int
    causal: bool  # also layers that do not slide

    def resolved(self) -> dict[str, Any]:
        """Return what options came to for the target, and no tensor's shape shows."""
        return {
            "layers": self.capture_layers,
            "mask_token_id": self.mask_token_id,
            "rope_theta": dict(self.rope),
            "rms_norm_eps": self.rms_norm_eps,
            "softcap": self.softcap,
        }


def draft_shape(config: DFlashConfig, target: TargetInfo, mask_token_id: int) -> DraftShape:
    """Resolve the options against the target.  Raises ConfigError when they do not fit it."""
    config.check(target)
    types = config.layer_types or (
        ("sliding_attention" if config.sliding_window else "full_attention",) * config.num_layers
    )
    return DraftShape(
        **decoder_fields(config, target),
        num_layers=config.num_layers,
        block_size=config.block_size,
        capture_layers=capture_layers(config, target.num_layers),
        layer_types=types,
        sliding_window=config.sliding_window if "sliding_attention" in types else None,
        mask_token_id=mask_token_id,
        causal=objective(config).causal,
    )


def capture_layers(config: DFlashConfig, num_layers: int) -> tuple[int, ...]:
    """Return the target layers to read, counted from 0 by their outputs.

    The last layer is not allowed: engines disagree on whether its output is normed,
    and those that read the input of the next layer cannot read it at all.
    """
    if config.layers is not None:
        ids = config.layers
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_layers - 2:
            raise ConfigError(
                f"strategy.layers {list(ids)} must increase within 0..{num_layers - 2} "
                f"for a target of {num_layers} layers. Try: strategy.layers=null (those published)"
            )
        return ids
    count = config.num_capture_layers or config.num_layers
    if num_layers < 4:
        raise ConfigError(
            f"a target of {num_layers} layers is too small for the default layers. "
            "Try: strategy.layers=[0]"
        )
    if count == 1:
        return (num_layers // 2,)
    span = num_layers - 4  # from layer 1 to layer n-3
    ids = tuple(round(1 + i * span / (count - 1)) for i in range(count))
    if len(set(ids)) != count:
        raise ConfigError(
            f"{count} default layers of a target of {num_layers} would be {list(ids)}, "
            f"some of them twice. Try: strategy.num_capture_layers={min(count - 1, span + 1)}"
        )
    return ids
