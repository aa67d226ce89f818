"""Which of a slot's most likely tokens follows the token before it.

Shapes: R slots, K candidates of each, H hidden size, V vocabulary, r the selector's rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.nn.linear_top_k import linear_top_k


class CandidateSelector(nn.Module):
    """Adds to each candidate's logit how well it follows a token, given the slot's state.

        score(b) = logit(b) + <predecessor_codebook[a] * (W h), successor_codebook[b]>

    for candidate b behind token a.  Where the successors are all 0, as first made, a candidate's
    score is its logit.
    """

    def __init__(self, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def forward(self, states: Tensor, previous: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores [R, K] float32.

        states [R, H]; previous [R] the token before each slot; candidates ids [R, K] and their
        logits [R, K] float32.
        """
        before = F.embedding(previous, self.predecessor_codebook)
        after = F.embedding(ids, self.successor_codebook)
        wanted = before * self.hidden_projection(states.to(before.dtype))
        return logits + torch.matmul(after, wanted[..., None]).squeeze(-1).float()


def candidates(
    states: Tensor, head: Tensor, labels: Tensor, top_k: int, *, softcap: float | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K most likely tokens [R, K], their logits [R, K] and if the label is among them.

    states [R, H] go through the frozen head [V, H] `chunk` rows at a time; logits are float32 and
    capped, likeliest first.  Where the label [R] is not among the K it takes the last one's
    place, which is what the selector's loss needs; what is drafted is chosen without it.
    """
    ids, logits = linear_top_k(states, head, top_k, also=labels, softcap=softcap, chunk=chunk)
    ids, logits, own = ids[:, :-1], logits[:, :-1], logits[:, -1]
    found = (ids == labels[:, None]).any(dim=1)
    last = torch.arange(top_k, device=ids.device) == top_k - 1
    missing = last & ~found[:, None]
    return (
        torch.where(missing, labels[:, None], ids),
        torch.where(missing, own[:, None], logits),
        found,
    )
