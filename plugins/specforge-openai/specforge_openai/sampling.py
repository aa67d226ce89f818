"""What every server is told of how to draw, whatever its API calls the rest."""

from __future__ import annotations

import hashlib
from typing import Any

from specforge_core.types import GenerateOptions, Prompt


def plain_sampling(options: GenerateOptions) -> dict[str, Any]:
    """Return the options as asked, and nothing of a model's or server's own defaults."""
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(options.eos),
    }


def request_seed(prompt: Prompt, options: GenerateOptions) -> int:
    """Return the seed of one prompt's draws, below 2^28: some servers take 32 bits."""
    digest = hashlib.sha256(f"{options.seed}/{prompt.index}".encode()).hexdigest()
    return int(digest[:7], 16)
