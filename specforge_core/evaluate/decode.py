"""Decode with a draft and a cached target so that the output is exactly the target's own.

A round: the proposer drafts K tokens behind the last one, the target runs once on
[last, *drafted], and the acceptance rule (`sampling.py`) keeps a prefix of the
draft and adds one token of the target's.  What it drops leaves the cache again.
A drafted tree is verified in one run as well (`tree.py`).

Shapes: T tokens, K drafted tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from ..errors import DataError
from ..types import CaptureSpec, Proposal, Proposer, Sampling, TargetCapture
from .cached import CachedTarget
from .sampling import check_proposal, next_token, verify_chain
from .tree import check_tree, depths, prune, verify_tree


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What the verifications of one or more answers did; `+` adds answers up.

    A verification is one run of the target on [last, *drafted].  The prompt's own
    run and the token it yields count nowhere.  Every verification counts whole,
    also what the last one emitted past `max_new_tokens`: cutting it there would
    lower the mean for a reason that is not the draft's.  Nothing behind an
    end-of-text token counts, neither as drafted nor as emitted.
    """

    verifications: int = 0
    emitted: int = 0  # tokens the verifications yielded: accepted ones and the target's own
    drafted_at: tuple[int, ...] = ()  # [k]: how often a token was drafted at position k, or some
    accepted_at: tuple[int, ...] = ()  # [k]: how often it, or one of them, was accepted there
    new_tokens: int = 0  # of the answers, the prompt's run included
    seconds: float = 0.0  # for the answers, the prompt's run included
    extra_runs: int = 0  # of the target, beside one per verification: for a state restored
    nodes: int = 0  # drafted tokens that the target ran on: a tree has several at a position

    @property
    def drafted(self) -> int:
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted per verification: accepted ones + 1, mean over verifications.

        One less where an accepted end-of-text token leaves nothing to add.
        """
        return self.emitted / self.verifications if self.verifications else None

    @property
    def per_position(self) -> tuple[float, ...]:
        """[k]: part of the tokens drafted at position k (from 0) that were accepted."""
        return tuple(a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True))

    @property
    def tokens_per_second(self) -> float | None:
        return self.new_tokens / self.seconds if self.seconds else None

    def __add__(self, other: DecodeStats) -> DecodeStats:
        return DecodeStats(
            self.verifications + other.verifications,
            self.emitted + other.emitted,
            _add(self.drafted_at, other.drafted_at),
            _add(self.accepted_at, other.accepted_at),
            self.new_tokens + other.new_tokens,
            self.seconds + other.seconds,
            self.extra_runs + other.extra_runs,
            self.nodes + other.nodes,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens that follow a prompt, and how they came about."""

    tokens: tuple[int, ...]
    stats: DecodeStats


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an answer ends."""

    max_new_tokens: int
    eos: frozenset[int]


@torch.inference_mode()
def generate(
    model: Any,
    proposer: Proposer,
    spec: CaptureSpec,
    prompt: Sequence[int],
    limits: Limits,
    sampling: Sampling,
    max_draft_tokens: int | None = None,
) -> Answer:
    """Answer a prompt with a draft; what is emitted follows the target's distribution.

    `spec` says which states the proposer is given.  Raises DataError when the
    prompt leaves no room in the target's positions, PluginError when the proposer
    breaks its contract.
    """
    start = time.perf_counter()
    space = room(model, prompt)
    most = min(proposer.max_tokens, max_draft_tokens or proposer.max_tokens)
    target = CachedTarget(model, spec)
    logits, prefix = target.run(prompt, keep=1)
    assert prefix is not None
    emitted = [next_token(logits[-1], sampling)]
    proposer.start(pick(prefix, list(range(len(prompt))), supervised=False))
    wanted = min(limits.max_new_tokens, space)
    stats = DecodeStats()
    while len(emitted) < wanted and emitted[-1] not in limits.eos:
        # the target runs on the last token and the draft: none may pass its last position
        asked = min(most, space - len(emitted))
        proposal = proposer.propose(emitted[-1], asked, sampling)
        check_proposal(proposal, asked, logits.shape[-1])
        if proposal.parents is not None:
            check_tree(proposal)
        proposal = _until_eos(proposal, limits.eos)
        drafted = proposal.tokens.tolist()
        parents = None if proposal.parents is None else proposal.parents.tolist()
        runs = target.runs
        logits, states = target.run([emitted[-1], *drafted], len(drafted) + 1, parents)
        verify = verify_chain if parents is None else verify_tree
        verdict = verify(logits, proposal, sampling)
        new = [*(drafted[i] for i in verdict.kept), verdict.next_token]
        if len(new) > 1 and new[-2] in limits.eos:
            new.pop()
        target.settle([emitted[-1], *drafted], verdict.kept, parents is not None)
        assert states is not None
        proposer.accept(pick(states, [0, *(1 + i for i in verdict.kept)], supervised=True))
        levels = len(drafted) if parents is None else max(depths(parents), default=0)
        extra_runs = target.runs - runs - 1
        stats += _round(levels, verdict.accepted, len(new), extra_runs, len(drafted))
        emitted += new
    tokens = tuple(emitted[:wanted])
    return Answer(tokens, stats + timed(tokens, start))


@torch.inference_mode()
def generate_plain(model: Any, prompt: Sequence[int], limits: Limits, sampling: Sampling) -> Answer:
    """Answer a prompt with the target alone, through the same cache code."""
    start = time.perf_counter()
    wanted = min(limits.max_new_tokens, room(model, prompt))
    target = CachedTarget(model, None)
    tokens: list[int] = []
    feed = prompt
    while len(tokens) < wanted and not (tokens and tokens[-1] in limits.eos):
        logits, _ = target.run(feed, keep=1)
        tokens.append(next_token(logits[-1], sampling))
        feed = tokens[-1:]
    return Answer(tuple(tokens), timed(tuple(tokens), start))


def room(model: Any, prompt: Sequence[int]) -> int:
    """Return how many tokens fit behind the prompt."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not prompt:
        raise DataError("a prompt has no tokens. Remove it from eval.prompts")
    if positions is not None and len(prompt) >= positions:
        raise DataError(
            f"a prompt of {len(prompt)} tokens leaves no room in the target's {positions} "
            "positions. Shorten or remove it in eval.prompts"
        )
    # targets without a limit (ALiBi, recurrent positions) still need a number
    return positions - len(prompt) if positions is not None else 1 << 40


def _until_eos(proposal: Proposal, eos: frozenset[int]) -> Proposal:
    """Cut a draft behind its first end-of-text token: the rest could never be emitted."""
    if proposal.parents is not None:
        return prune(proposal, eos)
    for place, token in enumerate(proposal.tokens.tolist()):
        if token in eos:
            probs = None if proposal.probs is None else proposal.probs[: place + 1]
            return Proposal(tokens=proposal.tokens[: place + 1], probs=probs)
    return proposal


def pick(capture: TargetCapture, places: list[int], *, supervised: bool) -> TargetCapture:
    """Return the tokens at `places`; the mask says whether they are an answer's."""
    rows = torch.tensor(places, device=capture.input_ids.device)
    return TargetCapture(
        index=capture.index,
        input_ids=capture.input_ids[rows],
        loss_mask=capture.loss_mask[rows] * int(supervised),
        hidden_states={
            layer: states[rows.to(states.device)] for layer, states in capture.hidden_states.items()
        },
        final=None if capture.final is None else capture.final[rows.to(capture.final.device)],
    )


def _round(levels: int, accepted: int, emitted: int, extra_runs: int, nodes: int) -> DecodeStats:
    accepted_at = (1,) * accepted + (0,) * (levels - accepted)
    return DecodeStats(1, emitted, (1,) * levels, accepted_at, extra_runs=extra_runs, nodes=nodes)


def timed(tokens: tuple[int, ...], start: float) -> DecodeStats:
    """Count an answer that was started at `start`, a time.perf_counter()."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return DecodeStats(new_tokens=len(tokens), seconds=time.perf_counter() - start)


def _add(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))
