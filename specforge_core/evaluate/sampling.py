"""The acceptance rule: which drafted tokens may stay so that the output is the target's own.

Greedy keeps a drafted token when it is the target's best one.  At a temperature
the rule is rejection sampling (Leviathan et al. 2023, Chen et al. 2023): a token
x that was drawn from q stays with probability min(1, p(x) / q(x)), and the first
one that does not stay is replaced by a draw from max(p - q, 0), normalized.

Shapes: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PluginError
from ..types import Proposal, Sampling

SUM_TOLERANCE = 1e-2  # a bfloat16 softmax over a large vocabulary sums to 1 within this


class ProposalError(PluginError):
    """A proposer broke its contract; who calls it knows whose it is."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many drafted tokens stay, and the target's own token behind them."""

    accepted: int
    next_token: int
    path: tuple[int, ...] | None = None  # which ones, in a tree; else the first ones

    @property
    def kept(self) -> tuple[int, ...]:
        """The places of the drafted tokens that stay, in order."""
        return tuple(range(self.accepted)) if self.path is None else self.path


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the distribution a token is drawn from: [..., V] to float32 [..., V].

    `temperature` must be positive.  Proposers draw from this too.
    """
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """Draw one index with probability proportional to `weights` [V], on any device.

    Only one number comes from the generator, which is on the CPU: a run draws the
    same tokens on every device, and no distribution is copied off it.
    """
    cumulative = weights.double().cumsum(0)
    threshold = torch.rand((), generator=generator, dtype=torch.float64).to(weights.device)
    # right: the first entry above the threshold, never one of weight zero
    index = torch.searchsorted(cumulative, threshold * cumulative[-1], right=True)
    return min(int(index), len(weights) - 1)


def next_token(logits: Tensor, sampling: Sampling) -> int:
    """Choose the target's next token from its logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return draw(probabilities(logits, sampling.temperature), sampling.generator)


def verify_chain(logits: Tensor, proposal: Proposal, sampling: Sampling) -> Verdict:
    """Decide about K drafted tokens, given the target's logits [K + 1, V].

    Row i of `logits` is the target's choice at the place of drafted token i; the
    last row comes behind all of them.
    """
    if sampling.temperature == 0:
        best = logits.argmax(-1)
        right = best[:-1] == proposal.tokens.to(best.device)
        accepted = int(right.cumprod(0).sum())
        return Verdict(accepted, int(best[accepted]))
    target = probabilities(logits, sampling.temperature)
    for place, token in enumerate(proposal.tokens.tolist()):
        p = target[place]
        q = drafted_from(proposal, place, p.device)
        chance = p[token] if q is None else p[token] / q[token]
        if float(torch.rand((), generator=sampling.generator, dtype=torch.float64)) < chance.item():
            continue
        return Verdict(place, draw(residual(p, q, token), sampling.generator))
    return Verdict(len(proposal.tokens), draw(target[-1], sampling.generator))


def drafted_from(proposal: Proposal, place: int, device: torch.device) -> Tensor | None:
    """Return q [V] of one drafted token; None when it was not drawn but chosen."""
    if proposal.probs is None:
        return None
    probs = proposal.probs[place].to(device, torch.float32)
    return probs / probs.sum()


def residual(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """Return what a replacement is drawn from, not normalized."""
    if q is None:
        rest = p.clone()
        rest[token] = 0
    else:
        rest = (p - q).clamp(min=0)
    # p equals q to rounding: nothing is left over, and the draw is the target's anyway
    return rest if float(rest.sum()) > 0 else p


def check_proposal(proposal: Proposal, max_tokens: int, vocab_size: int) -> None:
    """Raise ProposalError when a proposer broke its contract, which could bias the output."""
    tokens, probs = proposal.tokens, proposal.probs
    if tokens.ndim != 1 or len(tokens) > max_tokens:
        raise ProposalError(
            f"the proposer drafted tokens of shape {list(tokens.shape)} when asked for at most "
            f"{max_tokens}. It must return [K] with K <= max_tokens"
        )
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(strange):
        raise ProposalError(
            f"the proposer drafted token {int(strange[0])}, outside the target's vocabulary of "
            f"{vocab_size}. A draft vocabulary must be mapped back to the target's"
        )
    if probs is None or not len(tokens):
        return
    if tuple(probs.shape) != (len(tokens), vocab_size):
        raise ProposalError(
            f"the proposer gave probabilities of shape {list(probs.shape)} for {len(tokens)} "
            f"tokens. It must be {[len(tokens), vocab_size]}, over the target's vocabulary"
        )
    total = probs.float().sum(-1)
    chosen = probs.gather(1, tokens.to(probs.device)[:, None])
    sums = ((total - 1).abs() <= SUM_TOLERANCE).all() & (probs >= 0).all()
    if not bool(sums & (chosen > 0).all()):
        raise ProposalError(
            "the proposer's probabilities do not sum to 1, one is negative, or a drafted token's "
            "is 0. Return exactly what each token was drawn from"
        )
