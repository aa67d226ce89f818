"""Drafts all tokens after the verified ones in one pass, as a reference for serving.

The keys and values of the rows of verified tokens are cached in every layer; those of the mask's
are of one draft only.  Vd is the size of the draft vocabulary.
"""

from __future__ import annotations

import torch
from specforge_eagle3.attention import eager
from specforge_eagle3.proposer import FeatureProposer
from torch import Tensor

from specforge_core.nn.sampling import sample
from specforge_core.types import Proposal, Sampling

from .config import PeagleConfig
from .model import PeagleModel


class PeagleProposer(FeatureProposer[PeagleConfig, PeagleModel]):
    """Drafts for one sequence at a time."""

    @property
    def max_tokens(self) -> int:
        return self._config.draft_tokens

    @torch.no_grad()
    def propose(self, last_token: int, max_tokens: int, sampling: Sampling, /) -> Proposal:
        drawn, q = sample(self.logits(last_token, min(max_tokens, self.max_tokens)), sampling)
        return Proposal(tokens=self._tokens[drawn], probs=None if q is None else self._spread(q))

    @torch.no_grad()
    def logits(self, last_token: int, count: int) -> Tensor:
        """Return logits [count, Vd] float32 of the tokens after `last_token`.

        The row that pairs the last feature with `last_token` drafts the first of them.  It is
        run again when the next are drafted, which may be from the same.
        """
        model, device = self._model, self._model.fc.weight.device
        known = self._caches[0].length
        features = torch.cat([f.to(device) for f in self._features])
        ids = torch.tensor([*self._ids[1:], last_token, model.mask_token_id], device=device)
        self._ids, self._features = self._ids[-1:], [features[-1:]]
        places = torch.arange(known + len(features) + count - 1, device=device)
        visible = places[known:, None] >= places

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = self._caches[layer].extend(k, v)
            self._caches[layer].length -= count
            return eager(q, keys, None, visible)

        states = model.states(features, ids, self._frozen.embed, places[known:], attend)
        found: Tensor = model.lm_head(states[-count:]).float()
        return found
