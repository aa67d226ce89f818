"""What is captured from a target, and what runs it.  T tokens, H hidden size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

FinalState: TypeAlias = Literal["none", "pre_norm", "post_norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What a strategy may know about the target without loading its weights."""

    name_or_path: str
    revision: str | None
    hidden_size: int
    num_layers: int
    vocab_size: int
    config: Mapping[str, Any]  # the Hugging Face config of the text model, as a dict
    trust_remote_code: bool = False  # the user's leave, for whoever loads something of the target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One tokenized conversation: what the target reads, and what is supervised."""

    index: int  # its row in the data set, which names the sample everywhere
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] int64, 1 on the assistant's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One stored tensor.  None in `shape` is the token axis, always the first."""

    shape: tuple[int | None, ...]
    dtype: str  # a torch dtype's name: "bfloat16", "int64", ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSpec:
    """What to ask the target for, and what one stored sample must look like.

    Layer i is the output of decoder layer i, counted from 0; -1 is the embedding
    output.  Target engines translate to their own numbering.  `next_tokens` and
    `logsumexp` ask for what the target's head makes of every position, computed
    where the states are.

    Any method that asks for the same states may read a capture, and what a field is called is all
    that says what it holds: one that comes to mean something else needs another name.  `version`
    is compared only with captures of the strategy's own.
    """

    layers: tuple[int, ...]
    final: FinalState = "none"  # the last layer's output before or after the final norm, if wanted
    fields: Mapping[str, Field]
    next_tokens: bool = False  # the target's own most likely next token
    logsumexp: bool = False  # of the target's logits over its whole vocabulary
    version: int = 1  # the strategy's own count: bump when its old captures are of no more use


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCapture:
    """One sequence as the target saw it, before any strategy touched it.

    States are on whatever device the engine computed them; all else is on the CPU.
    """

    index: int  # of the Prompt
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] int64, 1 where the model is supervised
    hidden_states: Mapping[int, Tensor]  # layer -> [T, H]
    final: Tensor | None = None  # [T, H], normed or not as the spec asked
    next_tokens: Tensor | None = None  # [T] int64, where the spec asked
    logsumexp: Tensor | None = None  # [T] float32, where the spec asked


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How answers are drawn.  Temperature 0 is greedy."""

    max_new_tokens: int  # fewer where the target's positions end
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # with a prompt's index it decides that prompt's draws
    eos: frozenset[int] = frozenset()  # any of these ends an answer
    batch_size: int = 16  # answers at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What the target wrote behind one prompt."""

    index: int  # of the Prompt
    tokens: tuple[int, ...]  # the end token included, where there is one
    finished: bool  # an end token ended it, not the limit
    refused: str | None = None  # why the engine will not answer this prompt; no tokens then
    retokenized: bool = False  # the engine was given text alone, and made the tokens of it


class TargetEngine(Protocol):
    """Runs the target.

    One call at a time: an engine is not re-entrant, and an iterator that it returned is
    exhausted or closed before the next call.  Both calls yield one result per prompt, in any
    order.  An engine that cannot do one of them raises CaptureError and says what can.

    One that bears `generate` in another thread while something else is under way says so by an
    attribute `answers_beside = True`.  Else a training waits for a batch of its own answers.
    """

    @property
    def info(self) -> TargetInfo: ...
    def supports(self, spec: CaptureSpec, /) -> bool:
        """Say whether `capture` can give what a spec asks for; nothing is computed."""
        ...

    def capture(
        self, prompts: Sequence[Prompt], spec: CaptureSpec, /
    ) -> Iterator[TargetCapture]: ...
    def generate(
        self, prompts: Sequence[Prompt], options: GenerateOptions, /
    ) -> Iterator[Generated]: ...
    def close(self) -> None: ...


Sample: TypeAlias = "dict[str, Tensor]"  # one sequence, no batch axis


class Adapter(Protocol):
    """Turns a TargetCapture into the Sample a strategy stores; None skips it.

    `input_ids`, `loss_mask` and whatever else `transform` and `collate` decide by stay on the CPU.
    """

    @property
    def spec(self) -> CaptureSpec: ...
    def __call__(self, capture: TargetCapture, /) -> Sample | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One reason a capture cannot be trained on, and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"
