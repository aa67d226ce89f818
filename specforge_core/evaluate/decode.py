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
from torch import Tensor
from transformers import DynamicCache

from ..errors import ConfigError, DataError
from ..target.taps import tap_states
from ..types import CaptureSpec, Proposal, Proposer, Sampling, TargetCapture
from .sampling import check_proposal, next_token, verify_chain
from .tree import check_attention, check_tree, depths, keep_path, prune, tree_inputs, verify_tree

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


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


def check_cache(model: Any) -> None:
    """Raise ConfigError for a target whose cache cannot forget its last tokens."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if strange := sorted(kinds - ATTENTION):
        raise ConfigError(
            f"target {model.config.name_or_path!r} has layers of type {', '.join(strange)}, whose "
            "state cannot be rolled back after a rejected draft. Evaluate it in a serving engine"
        )


class CachedTarget:
    """The target on one sequence, with its cache.

    The cache keeps every layer's whole past, sliding windows included (their masks
    do the sliding), because a window that has moved on cannot be rolled back.
    """

    def __init__(self, model: Any, spec: CaptureSpec | None) -> None:
        self.model = model
        self.spec = spec
        self.cache = DynamicCache()

    def run(
        self, tokens: Sequence[int], keep: int, parents: Sequence[int] | None = None
    ) -> tuple[Tensor, TargetCapture | None]:
        """Append tokens; return the logits [keep, V] of the last ones, and all states.

        With `parents`, the tokens behind the first are a tree.
        """
        ids = torch.tensor([tokens], dtype=torch.long, device=self.model.device)
        past = self.cache.get_seq_length()
        extra = {} if parents is None else tree_inputs(parents, past, self.model)
        if self.spec is None:
            return self._forward(ids, keep, extra), None
        with tap_states(self.model, self.spec, stop=False) as tap:
            logits = self._forward(ids, keep, extra)
        states = {layer: tap.hidden_states[layer][0] for layer in self.spec.layers}
        final = None if tap.final is None else tap.final[0]
        ones = torch.ones_like(ids[0])
        return logits, TargetCapture(
            index=0, input_ids=ids[0], loss_mask=ones, hidden_states=states, final=final
        )

    def _forward(self, ids: Tensor, keep: int, extra: dict[str, Tensor]) -> Tensor:
        output = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep, **extra
        )
        logits: Tensor = output.logits[0, -keep:]
        return logits

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens from the cache."""
        if count:
            self.cache.crop(-count)


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
            check_attention(model)
        proposal = _until_eos(proposal, limits.eos)
        drafted = proposal.tokens.tolist()
        parents = None if proposal.parents is None else proposal.parents.tolist()
        past = len(prompt) + len(emitted) - 1
        logits, states = target.run([emitted[-1], *drafted], len(drafted) + 1, parents)
        verify = verify_chain if parents is None else verify_tree
        verdict = verify(logits, proposal, sampling)
        new = [*(drafted[i] for i in verdict.kept), verdict.next_token]
        if len(new) > 1 and new[-2] in limits.eos:
            new.pop()
        if parents is not None:
            keep_path(target.cache, past, verdict.kept)
        target.forget(len(drafted) - verdict.accepted)
        assert states is not None
        proposer.accept(pick(states, [0, *(1 + i for i in verdict.kept)], supervised=True))
        levels = len(drafted) if parents is None else max(depths(parents), default=0)
        stats += _round(levels, verdict.accepted, len(new))
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


def _round(drafted: int, accepted: int, emitted: int) -> DecodeStats:
    accepted_at = (1,) * accepted + (0,) * (drafted - accepted)
    return DecodeStats(1, emitted, (1,) * drafted, accepted_at)


def timed(tokens: tuple[int, ...], start: float) -> DecodeStats:
    """Count an answer that was started at `start`, a time.perf_counter()."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return DecodeStats(new_tokens=len(tokens), seconds=time.perf_counter() - start)


def _add(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))
