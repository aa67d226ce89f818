"""Drafts a chain or a tree after the verified tokens, as a reference for serving.

Row t pairs the target's feature of token t with the embedding of token t+1.  The keys and
values of such rows are cached; a drafted token's own are kept for this draft only.
Shapes: W rows drafted from at once, i own terms, H hidden size, v key/value heads of size d,
V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from specforge_core.nn.cache import GrowingCache
from specforge_core.nn.sampling import sample
from specforge_core.types import Proposal, Sampling, TargetCapture

from .attention import eager
from .config import Config, Eagle3Config
from .frozen import Frozen
from .head import VocabularyModel
from .model import Eagle3Model
from .vocab import target_tokens

Model = TypeVar("Model", bound=VocabularyModel)


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Where a draft may go on: one row per leaf."""

    feature: Tensor  # [W, H], what the next step is fed
    logits: Tensor  # [W, Vd] float32, of the token after the leaf
    keys: Tensor  # [i, W, v, d], of the leaf's own steps from 1 on
    values: Tensor  # [i, W, v, d]

    def pick(self, rows: Tensor) -> _Leaves:
        return _Leaves(
            self.feature[rows], self.logits[rows], self.keys[:, rows], self.values[:, rows]
        )


class FeatureProposer(Generic[Config, Model]):
    """Keeps a cache for each layer, and what of the verified tokens these have not yet."""

    def __init__(self, config: Config, model: Model, frozen: Frozen) -> None:
        self._config = config
        self._model = model
        self._frozen = frozen
        with torch.no_grad():
            self._tokens = target_tokens(model.d2t)  # [Vd]
        self._ids: list[int] = []  # tokens whose features are not in the cache yet
        self._features: list[Tensor] = []  # theirs, [n, 3H] each
        self._caches: list[GrowingCache] = []

    def start(self, prefix: TargetCapture, /) -> None:
        self._ids, self._features = [], []
        self._caches = [GrowingCache(0) for _ in range(self._model.shape.num_layers)]
        self.accept(prefix)

    def accept(self, accepted: TargetCapture, /) -> None:
        self._ids += accepted.input_ids.tolist()
        states = [accepted.hidden_states[i] for i in self._model.shape.capture_layers]
        self._features.append(torch.cat(states, dim=-1))

    def _spread(self, probs: Tensor) -> Tensor:
        """Return [K, V] of distributions [K, Vd] over the draft vocabulary."""
        out = probs.new_zeros(len(probs), self._model.shape.vocab_size)
        return out.index_copy_(1, self._tokens, probs)


class Eagle3Proposer(FeatureProposer[Eagle3Config, Eagle3Model]):
    """Drafts for one sequence at a time."""

    def __init__(self, config: Eagle3Config, model: Eagle3Model, frozen: Frozen) -> None:
        super().__init__(config, model, frozen)
        with torch.no_grad():
            self._weights = model.before.weights()
        self._first: tuple[Tensor, Tensor]  # all cached keys and values

    @property
    def max_tokens(self) -> int:
        chain = self._config.tree_top_k == 1
        return self._config.draft_length if chain else self._config.tree_tokens

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        if self._config.tree_top_k > 1:
            return self._tree(last_token, min(max_tokens, self.max_tokens))
        leaves = self._root(last_token)
        drafted: list[int] = []
        probs = []
        for i in range(1, min(max_tokens, self.max_tokens) + 1):
            choice, q = sample(leaves.logits[0], sampling)
            if q is not None:
                probs.append(q)
            drafted.append(int(self._tokens[choice]))
            if i < max_tokens and i < self.max_tokens:
                leaves = self._step(leaves, drafted[-1:], i)
        tokens = torch.tensor(drafted, device=self._tokens.device)
        return Proposal(tokens=tokens, probs=self._spread(torch.stack(probs)) if probs else None)

    @torch.no_grad()
    def chain_logits(self, last_token: int, drafted: list[int]) -> Tensor:
        """Return logits [1 + K, Vd] float32: after `last_token`, and after each given token."""
        leaves = self._root(last_token)
        found = [leaves.logits]
        for i, token in enumerate(drafted, 1):
            leaves = self._step(leaves, [token], i)
            found.append(leaves.logits)
        return torch.cat(found)

    def _root(self, last_token: int) -> _Leaves:
        """Cache the rows that `last_token` completes; return the last of them."""
        model, device = self._model, self._frozen.embed_tokens.device
        following = torch.tensor([*self._ids[1:], last_token], device=device)
        feature = model.fuse(torch.cat([f.to(device) for f in self._features]))
        self._ids, self._features = [], []
        positions = self._caches[0].length + torch.arange(len(feature), device=device)
        q, k, v = self._project(feature, following, positions)
        self._first = self._caches[0].extend(k, v)
        none = k.new_empty(0, 1, *k.shape[1:])
        return self._finish(q[-1:], feature[-1:], none, none)

    def _step(self, leaves: _Leaves, tokens: list[int], number: int) -> _Leaves:
        """Go on from each leaf with its token; `number` counts the steps from 1."""
        device = leaves.feature.device
        place = self._caches[0].length - 1 + number
        position = torch.full((len(tokens),), place, device=device)
        q, k, v = self._project(leaves.feature, torch.tensor(tokens, device=device), position)
        keys, values = torch.cat([leaves.keys, k[None]]), torch.cat([leaves.values, v[None]])
        return self._finish(q, leaves.feature, keys, values)

    def _project(
        self, feature: Tensor, ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self._model
        embedded = model.embedded(self._frozen.embed(ids), self._weights[0])
        rope = model.rotary(positions)
        q, k, v, _ = model.before(feature, embedded, self._weights[1], rope)
        return q, k, v

    def _finish(self, q: Tensor, feature: Tensor, keys: Tensor, values: Tensor) -> _Leaves:
        """Attend to the cached rows and the own steps, and leave the layer."""
        model = self._model
        attended = eager(q, self._first, (keys, values), visible=None)
        hidden, normed, *_ = model.after(attended.flatten(1), feature)
        logits = model.lm_head(normed).float()
        return _Leaves(normed if model.shape.norm_output else hidden, logits, keys, values)

    def _tree(self, last_token: int, budget: int) -> Proposal:
        """Expand the most probable leaves level by level; keep the most probable tokens of all.

        A node's probability is the product along its path, so whoever is kept has its parent
        kept: a parent is never less probable, and comes first among equals.
        """
        top_k = min(self._config.tree_top_k, len(self._tokens))
        leaves = self._root(last_token)
        nodes = torch.full((1,), -1)  # the node of each leaf
        scores = torch.zeros(1, device=leaves.logits.device)  # log of its probability
        found: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, parents, scores of each level
        total = 0
        for level in range(1, self._config.draft_length + 1):
            best = leaves.logits.log_softmax(-1).topk(top_k)  # [W, k]
            paths = (scores[:, None] + best.values).flatten()
            parents = nodes.repeat_interleave(top_k)
            tokens = self._tokens[best.indices.flatten()]
            found.append((tokens, parents, paths))
            if level == self._config.draft_length or level >= budget:
                break
            scores, chosen = paths.topk(min(top_k, len(paths)))
            nodes = total + chosen.cpu()
            total += len(paths)
            leaves = self._step(leaves.pick(chosen // top_k), tokens[chosen].tolist(), level)
        tokens, parents, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = scores.cpu().argsort(descending=True, stable=True)[:budget].sort().values
        renamed = torch.full((len(tokens) + 1,), -1)
        renamed[kept] = torch.arange(len(kept))
        chosen_tokens = tokens[kept.to(tokens.device)]
        return Proposal(tokens=chosen_tokens, probs=None, parents=renamed[parents[kept]])
