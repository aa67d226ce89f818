"""From a trained draft to accepted tokens.  K draft tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .capture import TargetCapture

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """An option's value in `Export.serve`: the path of a file of the export, wherever that is."""

    name: str  # one of `Export.files`


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a serving engine loads.  The core reads and writes the files."""

    config: Mapping[str, Any]  # config.json
    weights: Mapping[str, Tensor]  # model.safetensors
    files: Mapping[str, bytes] = field(default_factory=dict)  # others, by their plain names
    # engine -> the options that it needs to serve this draft, besides where it is; a value
    # may be an ExportFile
    serve: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # engine -> the environment variables that it needs to draft as was measured
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # key of config.json -> what drafting with another value would do, for who finds one
    causes: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None  # the model whose weights a serving engine needs besides these


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn.  Temperature 0 is greedy."""

    temperature: float
    generator: torch.Generator  # on the CPU


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NotServed:
    """Why an engine cannot serve an export here, and what to type instead."""

    reason: str
