"""What the model's own head makes of every position, on the device where the states are.

SGLang's own function does it, with its scale and softcap and, where the vocabulary is split over
ranks, its gathering of the parts.  It is handed a few rows at a time: the logits of a whole batch
would be larger than the batch's states.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .parts import Refusal

ROWS = 512  # whose logits exist at a time


def summarize(processor: Any, lm_head: Any, states: Tensor) -> dict[str, Tensor]:
    """Return the most likely next token [N] int64 and the logits' log-sum-exp [N] float32.

    `states` [N, H] are normed.  Every rank has to call it, with the same number of rows.
    """
    logits_of = getattr(processor, "_get_logits", None)
    if logits_of is None:
        raise Refusal(
            "this SGLang shows no logits of all positions, so there are no next_tokens and no "
            "logsumexp. Use SGLang 0.5.14 to 0.5.23, or target.engine=transformers"
        )
    plain = SimpleNamespace(next_token_logits_buffer=None)  # no buffer of a CUDA graph
    tokens, sums = [], []
    for rows in torch.split(states, ROWS):
        logits = logits_of(rows, lm_head, plain)
        token = logits.argmax(-1, keepdim=True)
        # z - log_softmax(z): one kernel reads and widens what takes logsumexp five
        below = torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, token)
        tokens.append(token[..., 0])
        sums.append((logits.gather(-1, token) - below)[..., 0])
    return {"next_tokens": torch.cat(tokens), "logsumexp": torch.cat(sums)}
