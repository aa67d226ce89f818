"""The values that pass between hooks, in the order data flows through a run.

No I/O, no registry, no config here.  torch is imported for typing only, so
importing this module is cheap.  Shape comments: T tokens, H target hidden size,
K draft tokens, V vocabulary, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FinalState: TypeAlias = Literal["none", "pre_norm", "post_norm"]

# ---- capture ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a strategy may know about the target without loading its weights."""

    name_or_path: str
    revision: str | None
    hidden_size: int
    num_layers: int
    vocab_size: int
    config: Mapping[str, Any]  # the Hugging Face config of the text model, as a dict


@dataclass(frozen=True, slots=True)
class Prompt:
    """One tokenized conversation: what the target reads, and what is supervised."""

    index: int  # its row in the data set, which names the sample everywhere
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] int64, 1 on the assistant's tokens


@dataclass(frozen=True, slots=True)
class Field:
    """One stored tensor.  None in `shape` is the token axis, always the first."""

    shape: tuple[int | None, ...]
    dtype: str  # a torch dtype's name: "bfloat16", "int64", ...


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """What to ask the target for, and what one stored sample must look like.

    Layer i is the output of decoder layer i, counted from 0; -1 is the embedding
    output.  Target engines translate to their own numbering.
    """

    layers: tuple[int, ...]
    final: FinalState  # the last layer's output before or after the final norm, if wanted
    fields: Mapping[str, Field]
    version: int = 1  # bump when old captures can no longer be trained on


@dataclass(frozen=True, slots=True)
class TargetCapture:
    """One sequence as the target saw it, before any strategy touched it."""

    index: int  # of the Prompt
    input_ids: Tensor  # [T]
    loss_mask: Tensor  # [T], 1 where the model is supervised
    hidden_states: Mapping[int, Tensor]  # layer -> [T, H]
    final: Tensor | None  # [T, H], normed or not as the spec asked


class TargetEngine(Protocol):
    """Runs the target.  Yields one capture per prompt, in any order."""

    @property
    def info(self) -> TargetInfo: ...
    def capture(
        self, prompts: Sequence[Prompt], spec: CaptureSpec, /
    ) -> Iterator[TargetCapture]: ...
    def close(self) -> None: ...


Sample: TypeAlias = "dict[str, Tensor]"  # one sequence, no batch axis


class Adapter(Protocol):
    """Turns a TargetCapture into the Sample a strategy stores; None skips it."""

    @property
    def spec(self) -> CaptureSpec: ...
    def __call__(self, capture: TargetCapture, /) -> Sample | None: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason a capture cannot be trained on, and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


# ---- data ------------------------------------------------------------------


class Reader(Protocol):
    """Random access to stored samples.  Must pickle: it may be sent to workers."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@runtime_checkable
class GrowingReader(Protocol):
    """A Reader of a capture that is still being written (`data.follow`)."""

    def refresh(self) -> bool:
        """See what was added since; True once nothing more will come."""
        ...


Batch: TypeAlias = "dict[str, Tensor]"  # batch axis first on every tensor
Transform: TypeAlias = "Callable[[Sample], Sample | None]"  # None drops the sample
Collate: TypeAlias = "Callable[[Sequence[Sample]], Batch]"

# ---- training --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model, and how the trainer treats its parts."""

    model: nn.Module  # trained, sharded and checkpointed, all of it
    shard_units: tuple[nn.Module, ...] = ()  # fully_shard each, in order, then the root
    frozen: nn.Module | None = None  # target embeddings or lm_head: replicated, never saved
    # parts that run many times in a step: compiled like shard units, but sharded with the root,
    # so that they are gathered and their gradients reduced once
    repeated_units: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, slots=True)
class Ratio:
    """A metric as numerator and denominator, so sums over ranks stay exact."""

    num: Tensor  # scalar
    den: Tensor  # scalar


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where in the run one micro-batch is."""

    step: int
    total_steps: int
    generator: torch.Generator  # on the CPU, checkpointed; use it for every random draw


def _no_metrics() -> dict[str, Ratio]:
    return {}


@dataclass(frozen=True, slots=True)
class StepOutput:
    """A summed loss and its weight.  The trainer divides by the global weight."""

    loss_sum: Tensor  # scalar, with a gradient
    weight: Tensor  # scalar
    metrics: Mapping[str, Ratio] = field(default_factory=_no_metrics)


class TrainStep(Protocol):
    """Computes one micro-batch.  Call `draft.model(...)`, never its methods."""

    def __call__(self, draft: Draft, batch: Batch, ctx: StepContext, /) -> StepOutput: ...


@runtime_checkable
class Simulator(Protocol):
    """A TrainStep that also says what its drafts would get accepted.

    Its metric `acceptance_length` is 1 + the drafted tokens right before the first wrong
    one, mean over the places where both the last token and the first drafted one are
    supervised; the end of what is supervised is a wrong one.
    """

    @property
    def draft_tokens(self) -> int:
        """Tokens that a simulated draft has at most."""
        ...


# ---- export and evaluation -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Export:
    """What a serving engine loads.  The core reads and writes the files."""

    config: Mapping[str, Any]  # config.json
    weights: Mapping[str, Tensor]  # model.safetensors


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.  Temperature 0 is greedy."""

    temperature: float
    generator: torch.Generator  # on the CPU


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens drafted after the last verified one: a chain, or with `parents` a tree.

    In a tree, siblings are tried in order; each is drawn from its `probs` given that
    those before it were rejected.
    """

    tokens: Tensor  # [K] int64
    probs: Tensor | None  # [K, V], what each token was drawn from; None when chosen, not drawn
    parents: Tensor | None = None  # [K] int64: the token each follows, before it; -1 is the last


class Proposer(Protocol):
    """Drafts for one sequence at a time.  The core verifies, so output is the target's.

    `start` sees the prompt; each `accept` sees the tokens verified since, the
    last verified one excluded: the target has not run on it yet.
    """

    @property
    def max_tokens(self) -> int: ...
    def start(self, prefix: TargetCapture, /) -> None: ...
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal: ...
    def accept(self, accepted: TargetCapture, /) -> None: ...


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One greedy answer of a serving engine, counted as `evaluate.decode.DecodeStats` counts."""

    tokens: tuple[int, ...]
    verifications: int
    emitted: int  # tokens the verifications yielded; the prompt's own run counts nowhere


class DraftServer(Protocol):
    """An engine that serves the target with an exported draft, drafting chains."""

    @property
    def name(self) -> str:
        """Engine and version, for reports."""
        ...

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: frozenset[int], /
    ) -> list[ServedAnswer]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NotServed:
    """Why an engine cannot serve an export here, and what to type instead."""

    reason: str
