"""A drafted tree in one run of the target: its mask, its verification, its place in the cache.

Row 0 of such a run is the last verified token, row 1 + i the drafted token i.

Shapes: K drafted tokens, P tokens in the cache before them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import Proposal, Sampling
from .sampling import ProposalError, Verdict, drafted_from, draw, probabilities, residual


def check_tree(proposal: Proposal) -> None:
    """Raise ProposalError unless every drafted token follows one before it, or the last one."""
    parents = proposal.parents
    assert parents is not None
    places = torch.arange(len(proposal.tokens), device=parents.device)
    if parents.shape != places.shape or bool(((parents < -1) | (parents >= places)).any()):
        raise ProposalError(
            f"the proposer gave parents {parents.tolist()} for {len(places)} drafted tokens. "
            "Each must be the index of an earlier one, or -1"
        )


def leaves(parents: Sequence[int]) -> list[int]:
    """Return the tokens that none follows; a tree without tokens has the last one, -1."""
    followed = set(parents)
    return [i for i in range(len(parents)) if i not in followed] or [-1]


def ancestors(parents: Sequence[int], token: int) -> list[int]:
    """Return the path down to a token, itself included."""
    path: list[int] = []
    while token >= 0:
        path.append(token)
        token = parents[token]
    return path[::-1]


def depths(parents: Sequence[int]) -> list[int]:
    """Return each token's level, from 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def tree_inputs(parents: Sequence[int], past: int, model: Any) -> dict[str, Tensor]:
    """Return the position ids and the mask [1, 1, 1 + K, P + 1 + K] of a run on a tree.

    A token sees the cache, the last token, its ancestors and itself.
    """
    count = 1 + len(parents)
    sees = torch.eye(count, dtype=torch.bool)
    sees[:, 0] = True
    for row, parent in enumerate(parents, 1):
        if parent >= 0:
            sees[row] |= sees[1 + parent]
    visible = torch.cat([torch.ones(count, past, dtype=torch.bool), sees], dim=1)
    mask = torch.zeros(visible.shape, dtype=model.dtype)
    mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    places = torch.tensor([[past, *(past + depth for depth in depths(parents))]])
    return {
        "position_ids": places.to(model.device),
        "attention_mask": mask[None, None].to(model.device),
    }


def verify_tree(logits: Tensor, proposal: Proposal, sampling: Sampling) -> Verdict:
    """Walk down a tree as far as its tokens may stay, given the target's logits [1 + K, V].

    At each node its children are tried in order by the rule for one token; where one does not
    stay, the next is tried against what is left of the target's distribution (recursive
    rejection sampling), and the target's own token is drawn from what the last one leaves.
    """
    assert proposal.parents is not None
    tokens, parents = proposal.tokens.tolist(), proposal.parents.tolist()
    best = logits.argmax(-1).tolist() if sampling.temperature == 0 else None
    node, path = -1, list[int]()
    while True:
        children = [i for i, parent in enumerate(parents) if parent == node]
        if best is not None:
            choice: int = best[1 + node]
            taken = next((i for i in children if tokens[i] == choice), None)
        else:
            taken, choice = _try(logits[1 + node], children, proposal, sampling)
        if taken is None:
            return Verdict(len(path), choice, tuple(path))
        path.append(taken)
        node = taken


def _try(
    logits: Tensor, children: Sequence[int], proposal: Proposal, sampling: Sampling
) -> tuple[int | None, int]:
    """Return the child that stays, or the target's own token if none does."""
    p = probabilities(logits, sampling.temperature)
    for child in children:
        token = int(proposal.tokens[child])
        q = drafted_from(proposal, child, p.device)
        chance = p[token] if q is None else p[token] / q[token]
        if float(torch.rand((), generator=sampling.generator, dtype=torch.float64)) < chance.item():
            return child, token
        p = residual(p, q, token)
        p = p / p.sum()
    return None, draw(p, sampling.generator)


def prune(proposal: Proposal, ends: frozenset[int]) -> Proposal:
    """Cut a tree behind its end-of-text tokens: what follows could never be emitted."""
    assert proposal.parents is not None
    tokens, parents = proposal.tokens.tolist(), proposal.parents.tolist()
    kept: dict[int, int] = {-1: -1}  # old index -> new one
    for place, parent in enumerate(parents):
        if parent in kept and (parent < 0 or tokens[parent] not in ends):
            kept[place] = len(kept) - 1
    chosen = torch.tensor([i for i in kept if i >= 0], dtype=torch.long)
    probs = proposal.probs
    return Proposal(
        tokens=proposal.tokens[chosen.to(proposal.tokens.device)],
        probs=None if probs is None else probs[chosen.to(probs.device)],
        parents=torch.tensor([kept[parents[int(i)]] for i in chosen], dtype=torch.long),
    )


def keep_path(cache: Any, past: int, path: Sequence[int]) -> None:
    """Move the entries of a path behind the last verified token's; the rest may be cropped."""
    for layer in cache.layers:
        if layer.keys is None:  # it reads another layer's
            continue
        for stored in (layer.keys, layer.values):
            rows = torch.tensor(path, dtype=torch.long, device=stored.device) + past + 1
            stored[:, :, past + 1 : past + 1 + len(path)] = stored[:, :, rows]
