"""Whether what a proposer draws follows the distributions that it says it drew from.

Shapes: N drafts of K tokens (the shortest's), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import Proposal

DRAFTS = 64
MOST = 6.0  # standard deviations: one of 500 million is farther off by chance


def check_drawn(drafts: Sequence[Proposal]) -> None:
    """Assert that tokens were drawn from the distributions that came with them, if any did.

    By their surprise: log q(x) is on average -H(q) where x is drawn from q, whatever the tokens
    before x were, so its sum over drafts is within a few standard deviations of that.  Drawing at
    another temperature, the best token for a drawn one, and ids of other tokens all move it.
    """
    if all(draft.probs is None for draft in drafts):
        return
    count = min(len(draft.tokens) for draft in drafts)
    parts = [(d.tokens[:count], d.probs[:count]) for d in drafts if d.probs is not None]
    assert len(parts) == len(drafts), "some drafts come with distributions, and some without"
    tokens, probs = (torch.stack(list(column)) for column in zip(*parts, strict=True))
    torch.testing.assert_close(probs.sum(-1).float(), torch.ones(tokens.shape), rtol=1e-4, atol=0)
    probs = probs.double()
    logs = probs.clamp(min=1e-30).log()
    mean = (probs * logs).sum(-1)
    spread = (probs * logs**2).sum(-1) - mean**2  # [N, K]
    told = logs.gather(2, tokens[..., None]).squeeze(2)
    off = (told - mean).sum(0) / spread.sum(0).clamp(min=1e-6).sqrt()
    assert float(off.abs().max()) < MOST, f"drawn otherwise than said, at the places {off.tolist()}"
