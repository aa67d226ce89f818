"""From stored samples to a trained draft.  V vocabulary, B rows of a batch, S the longest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from .capture import Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh


class Reader(Protocol):
    """Random access to stored samples.  Threads may share it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@runtime_checkable
class GrowingReader(Protocol):
    """A Reader of a capture that is still being written (`data.follow`)."""

    def refresh(self) -> bool:
        """See what was added since; True once nothing more will come."""
        ...


# Batch axis first on every tensor.  A packed batch has `document_ids` [B, S] (1, 2, ... on the
# samples of a row, 0 on padding; no two rows share a document) and `position_ids` [B, S], which
# count from 0 in each document.  Documents never see each other.
Batch: TypeAlias = "dict[str, Tensor]"
DOCUMENT_IDS, POSITION_IDS = "document_ids", "position_ids"
# All that is random in training is drawn here, from a CPU generator seeded by (seed, epoch,
# sample): the same whatever the batch, the device, the world size or a resume.  None drops it.
Transform: TypeAlias = "Callable[[Sample, torch.Generator], Sample | None]"
# Deterministic, in the prefetch thread: every size that depends on data is worked out here, so
# that a train step waits for the device nowhere.  The core moves the batch afterwards.
Collate: TypeAlias = "Callable[[Sequence[Sample]], Batch]"


@runtime_checkable
class Counting(Protocol):
    """A Transform that also says what a step makes of a sample, so that ranks have as much to do.

    Without it, a sample counts for its tokens and for those of them that are supervised.
    """

    def rows(self, tokens: int, supervised: int, /) -> int:
        """Return the rows, anchors or the like of a sample, about: nothing of it is read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """What a new draft may know of the data it will be trained on."""

    token_counts: Tensor | None  # [V] int64, how often each is supervised; None while it grows
    num_samples: int | None  # of one epoch; None while the capture still grows


def _every(name: str) -> bool:
    return True


def _nothing() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model, and how the trainer treats its parts."""

    model: nn.Module  # trained
    frozen: nn.Module | None = None  # target embeddings or lm_head: replicated, never saved
    shard: tuple[nn.Module, ...] = ()  # fully_shard each, in order, then the root
    # compiled one by one; those that run many times a step are better not in `shard`, so that
    # they are gathered and their gradients reduced once
    compile: tuple[nn.Module, ...] | None = None  # None: as `shard`
    # whose matrices are hidden layers, which Muon's orthogonalised update is meant for, and
    # products in float8 (`train.precision`)
    hidden: tuple[nn.Module, ...] | None = None  # None: as `compile`
    saved: Callable[[str], bool] = _every  # by state_dict name: what checkpoints hold
    # by parameter name: which matrices `train.weight_decay` shrinks; vectors it never does
    decayed: Callable[[str], bool] = _every
    # what options came to for this target (layers, mask token, rotary parameters), as JSON:
    # recorded with every checkpoint and export, and compared when one is read back
    resolved: Mapping[str, Any] = field(default_factory=_nothing)

    @property
    def compiled(self) -> tuple[nn.Module, ...]:
        return self.shard if self.compile is None else self.compile

    @property
    def hidden_units(self) -> tuple[nn.Module, ...]:
        return self.compiled if self.hidden is None else self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A metric as numerator and denominator, so sums over ranks stay exact."""

    num: Tensor  # scalar
    den: Tensor  # scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Where in the run one micro-batch is."""

    step: int  # optimizer steps done before it
    total_steps: int  # at most, time may end it before; with `train.batch_tokens` about
    generator: torch.Generator  # on the CPU, seeded by (seed, step, rank); for what is no sample's
    training: bool  # False under validation, which runs without gradients
    mesh: DeviceMesh  # of all ranks
    # how far the run is: 0 at its first step, 1 at its last, whichever of `train.max_steps`,
    # `train.epochs` and `train.max_minutes` ends it.  What a loss does over a run follows this,
    # as the learning rate does
    progress: float = 0.0


def _no_metrics() -> dict[str, Ratio]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """A summed loss and its weight.  The trainer divides by the global weight.

    Any split of a batch adds up.  The names of the metrics are the same in every step and on
    every rank, and none of the core's own (`RESERVED_METRICS`).
    """

    loss_sum: Tensor  # scalar, with a gradient
    weight: Tensor  # scalar
    metrics: Mapping[str, Ratio] = field(default_factory=_no_metrics)


RESERVED_METRICS = frozenset(
    {
        "loss",
        "step",
        "epoch",
        "learning_rate",
        "grad_norm",
        "tokens",
        "seconds",
        "tokens_per_second",
    }
)  # and all that begins with "seconds_", "validation/", "acceptance/" or "eval/"


class TrainStep(Protocol):
    """Computes one micro-batch.  Call `draft.model(...)`, never its methods.

    `frozen` is on the batch's device in the compute dtype; the model's parameters are float32
    and gathered in the compute dtype.  Waits for the device nowhere.
    """

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


@runtime_checkable
class Planned(Protocol):
    """A TrainStep that also says what it will hold, so that `train --plan` can."""

    def step_bytes(
        self, draft: Draft, tokens: int, documents: int, item: int, *, recompute: bool
    ) -> Mapping[str, int]:
        """Return bytes by what they are for, all there when a step holds most.

        Of so many tokens in so many samples, in a dtype of `item` bytes: the batch, and what is
        made of it.  Weights, what is frozen and the weights' whole gradients are not counted.
        """
        ...


@runtime_checkable
class Float8Heads(Protocol):
    """A TrainStep that makes logits in float8, too, where `train.precision` says so."""

    def float8_heads(self, draft: Draft) -> Mapping[str, Tensor]:
        """Return the heads' weights by name; those of sizes that are no multiples of 16 stay."""
        ...


class Tracker(Protocol):
    """Where a run's numbers go.  On rank 0 only; a failure warns once and ends no run."""

    def start(self, info: Mapping[str, Any], /) -> None:
        """Before the first step; also when a run is resumed (`info["step"]` is not 0 then)."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], /) -> None: ...
    def event(self, name: str, values: Mapping[str, Any], /) -> None:
        """A checkpoint was saved, ...: `name` says what, `values` has its step."""
        ...

    def close(self) -> None: ...
