"""Options by which a step fits its devices: they change no result but by rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import MANY
from .watched import Watched


class Fitted(Watched):
    """What a step's memory and work are traded by."""

    batch_tokens: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Tokens per micro-batch and rank, about, instead of `batch_size` samples: the "
        "samples of all ranks are dealt out so that each has as many tokens, and as many rows to "
        "train on.",
    )
    recompute: bool = Field(
        False,
        description="Make the draft's units a second time in the backward pass instead of keeping "
        "what they computed: less memory, more time.",
    )
    precision: Literal["fp8"] | None = Field(
        None,
        description="fp8: the linear layers of the draft's hidden units, and most logits, are "
        "products of float8 numbers, with a scale for each line that is summed over; all else, "
        "and the weights, stay as they are. For GPUs from compute capability 8.9 on (slow on a "
        "CPU). If not set: all is computed in `train.compute_dtype`.",
    )
    optimizer_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of what adamw and muon keep between steps (not of the weights); bfloat16 "
        "takes half the memory, for `train.betas` up to 0.98. Refused with a package's optimizer "
        "that does not know of it.",
    )
    shard_size: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Ranks that share one copy of weights, gradients and optimizer states, of "
        "ranks that follow each other; the other ranks hold copies. If not set: all share one.",
    )
    trace_steps: int | None = Field(
        None,
        gt=0,
        le=1000,
        description="Steps of the first rank to trace with torch's profiler, behind the first ten: "
        "into OUTPUT_DIR/trace-STEP.json.gz, and on a GPU a line that says how much of the time it "
        "computed, only sent or waited for other ranks, and had nothing to do.",
    )


def check_batch_tokens(train: Fitted, *, longest: int, follows: bool) -> None:
    """Raise ValueError where samples cannot be cut into steps by their tokens."""
    if train.batch_tokens is None:
        return
    if train.batch_tokens < longest:
        raise ValueError(
            f"train.batch_tokens is {train.batch_tokens}, and a sample may have data.max_length="
            f"{longest}. Try: train.batch_tokens={4 * longest}"
        )
    if follows:
        raise ValueError(
            "train.batch_tokens cannot be had with data.follow: the lengths of samples that are "
            "still captured are not known. Try: train.batch_size"
        )
    if train.regenerate_every is not None:
        raise ValueError(
            "train.batch_tokens cannot be had with train.regenerate_every. Try: train.batch_size"
        )
