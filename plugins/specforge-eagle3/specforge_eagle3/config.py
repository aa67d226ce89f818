"""The options of the EAGLE-3 strategy, and what they come to for one target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from specforge_core.config import MayChange
from specforge_core.errors import ConfigError
from specforge_core.nn.decoder import DecoderOptions, DecoderShape, decoder_fields
from specforge_core.nn.soft_loss import SoftLoss
from specforge_core.types import TargetInfo

SINCE_0_1 = {"grow_steps", "hard_share", "hard_until"}  # options that 0.1 did not have


class VocabularyOptions(DecoderOptions):
    """Base of a `strategy:` section whose draft is trained on the target's distributions.

    It reads three layers of the target, and drafts from a vocabulary of its own.
    """

    layers: Annotated[tuple[int, int, int] | None, MayChange.ALWAYS] = Field(
        None, description="Target layers whose outputs are read; the published formula if not set."
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
        "label", description="Whose token must be supervised: t+2, t+1 or t of row t."
    )
    layer_type: Literal["llama", "qwen3"] = Field(
        "llama", description="qwen3 norms queries and keys."
    )
    train_head: Annotated[bool, MayChange.AT_START] = Field(
        True, description="Train the draft's head, or keep the target's rows."
    )
    attention: Annotated[Literal["auto", "eager"], MayChange.ALWAYS] = Field(
        "auto", description="auto: fused kernels on a GPU if they take dtype and heads, else eager."
    )
    head_chunk: Annotated[int, MayChange.ALWAYS] = Field(
        3584, gt=0, le=10**6, description="Rows whose logits exist at a time, about."
    )
    export_dtype: Annotated[Literal["bfloat16", "float16", "float32"], MayChange.ALWAYS] = Field(
        "bfloat16", description="Of the exported weights."
    )
    seed: Annotated[int, MayChange.AT_START] = Field(
        0, ge=0, le=2**32 - 1, description="Of the draft's first weights."
    )

    @model_validator(mode="after")
    def _vocabulary_and_loss_agree(self) -> VocabularyOptions:
        if isinstance(self.draft_vocab_size, int) and self.draft_vocab_size <= 0:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} must be above 0, or full")
        if self.vocab_map is not None and self.draft_vocab_size == "full":
            raise ValueError("vocab_map has no effect with draft_vocab_size=full: remove one")
        for name in ("lk_decay", "lk_scale"):  # a stored config names all options
            default = type(self).model_fields[name].default
            if self.loss != "lk_lambda" and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with loss {self.loss!r}: remove it")
        return self

    @property
    def objective(self) -> SoftLoss:
        """The loss of one row."""
        if self.loss == "lk_lambda":
            return SoftLoss("hybrid", self.lk_scale, self.lk_decay)
        return SoftLoss("cross_entropy" if self.loss == "kl" else "log_overlap")


Config = TypeVar("Config", bound=VocabularyOptions)


class Eagle3Config(VocabularyOptions):
    """The `strategy:` section of an EAGLE-3 run."""

    layer_type: Literal["llama", "qwen3"] = Field(
        "llama", description="qwen3 norms queries and keys; SGLang serves llama only."
    )
    steps: Annotated[int, MayChange.AT_START] = Field(
        7, gt=0, le=1024, description="Steps of training-time test."
    )
    step_decay: Annotated[float, MayChange.AT_START] = Field(
        0.8, gt=0, le=1, description="Step i weighs step_decay^i."
    )
    mean_over: Annotated[Literal["positions", "supervised"], MayChange.AT_START] = Field(
        "positions", description="What the loss is divided by: all positions, or trained ones."
    )
    grow_steps: Annotated[float, MayChange.AT_START] = Field(
        0.0, ge=0, le=1, description="Part of the training in which steps grow from 1 to all."
    )
    hard_share: Annotated[float, MayChange.AT_START] = Field(
        0.0, ge=0, lt=1, description="Part of the labels, of highest entropy, left out at first."
    )
    hard_until: Annotated[float, MayChange.AT_START] = Field(
        0.5, gt=0, le=1, description="Part of the training in which these come back, bit by bit."
    )
    fc_norm: bool = Field(False, description="Norm each captured state before fc (EAGLE-3.1).")
    norm_output: bool = Field(False, description="Feed the normed state back (EAGLE-3.1).")
    draft_length: Annotated[int, MayChange.ALWAYS] = Field(
        7, gt=0, le=1024, description="Tokens of a drafted chain; levels of a tree."
    )
    tree_top_k: Annotated[int, MayChange.ALWAYS] = Field(
        1, gt=0, le=1024, description="Branches of a drafted tree; 1 drafts a chain."
    )
    tree_tokens: Annotated[int, MayChange.ALWAYS] = Field(
        31, gt=0, le=10**5, description="Tokens of a drafted tree, at most."
    )

    @model_validator(mode="before")
    @classmethod
    def _as_0_1_stored_it(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not raw.keys() >= cls.model_fields.keys() - SINCE_0_1:
            return raw  # a person's, not a stored one, which names all options
        kept = {key: value for key, value in raw.items() if key != "batches"}
        return kept | ({"attention": "auto"} if kept.get("attention") == "flash" else {})

    @model_validator(mode="after")
    def _options_agree(self) -> Eagle3Config:
        if not self.hard_share and self.hard_until != type(self).model_fields["hard_until"].default:
            raise ValueError("hard_until has no effect with hard_share 0: remove it")
        return self

    @property
    def step_weights(self) -> list[float]:
        """What the steps weigh, step_decay^i."""
        return [self.step_decay**i for i in range(self.steps)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape(DecoderShape):
    """Everything about a draft's structure, resolved against one target."""

    capture_layers: tuple[int, ...]
    published_layers: tuple[int, ...]  # what engines capture for a draft that names none
    draft_vocab_size: int
    qk_norm: bool
    fc_norm: bool = False
    norm_output: bool = False
    num_layers: int = 1

    def resolved(self) -> dict[str, Any]:
        """Return what options came to for the target, and no tensor's shape shows."""
        return {
            "layers": self.capture_layers,
            "rope_theta": dict(self.rope),
            "rms_norm_eps": self.rms_norm_eps,
        }

    @property
    def full_vocab(self) -> bool:
        return self.draft_vocab_size == self.vocab_size


def draft_shape(config: Eagle3Config, target: TargetInfo) -> DraftShape:
    """Resolve the options against the target.  Raises ConfigError when they do not fit it."""
    return DraftShape(
        **shape_fields(config, target), fc_norm=config.fc_norm, norm_output=config.norm_output
    )


def shape_fields(config: VocabularyOptions, target: TargetInfo) -> dict[str, Any]:
    """Return the fields of a DraftShape without a default.

    Raises ConfigError when the options do not fit the target.
    """
    wanted = config.draft_vocab_size
    if wanted != "full" and wanted > target.vocab_size:
        raise ConfigError(
            f"strategy.draft_vocab_size {wanted} is larger than the target's vocabulary of "
            f"{target.vocab_size}. Try: strategy.draft_vocab_size=full"
        )
    return {
        **decoder_fields(config, target),
        "capture_layers": capture_layers(config, target.num_layers),
        "published_layers": published_layers(target.num_layers),
        "draft_vocab_size": target.vocab_size if wanted == "full" else wanted,
        "qk_norm": config.layer_type == "qwen3",
    }


def capture_layers(config: VocabularyOptions, num_layers: int) -> tuple[int, ...]:
    """Return the target layers to read, low to high, counted from 0 by their outputs.

    By default the published ones.  The last layer is not allowed: engines disagree on whether
    its output is normed.
    """
    if num_layers < 4:
        raise ConfigError(
            f"a target of {num_layers} layers is too small for a draft that reads three layers "
            "below the last. Try: another target.path"
        )
    ids = config.layers
    if ids is not None:
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_layers - 2:
            raise ConfigError(
                f"strategy.layers {list(ids)} must increase within 0..{num_layers - 2} "
                f"for a target of {num_layers} layers. Try: strategy.layers=null (those published)"
            )
        return ids
    published = published_layers(num_layers)
    if len(set(published)) < 3 or list(published) != sorted(published):
        raise ConfigError(
            f"the default layers of a target of {num_layers} would be {list(published)}, which do "
            f"not increase. Try: strategy.layers=[0,{(num_layers - 2) // 2},{num_layers - 2}]"
        )
    return published


def published_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the layers whose outputs engines capture unless a draft names others."""
    return (1, num_layers // 2 - 1, num_layers - 4)
