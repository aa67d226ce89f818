"""Answers through SGLang's own /generate: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from operator import index
from typing import Any

from specforge_openai.sampling import plain_sampling, request_seed

from specforge_core.errors import CaptureError
from specforge_core.target.asked import answer_room
from specforge_core.types import Generated, GenerateOptions, Prompt, TargetInfo


def sampling_params(prompt: Prompt, options: GenerateOptions, info: TargetInfo) -> dict[str, Any]:
    """Return settings that leave nothing to the server's or the model's own defaults.

    SGLang heeds the seed where it runs with --enable-deterministic-inference.
    """
    params: dict[str, Any] = {
        "max_new_tokens": answer_room(info, len(prompt.input_ids), options),
        **plain_sampling(options),
        "no_stop_trim": True,
    }
    if options.temperature > 0:
        params["sampling_seed"] = request_seed(prompt, options)
    return params


def as_answer(found: Mapping[str, Any], prompt: Prompt, url: str) -> Generated:
    """Return what /generate said; CaptureError where it gives no token ids."""
    reason = tokens = None
    with suppress(LookupError, TypeError):
        reason = found["meta_info"]["finish_reason"]["type"]
        tokens = tuple(map(index, found["output_ids"]))
    if tokens is None or reason not in ("stop", "length"):
        raise CaptureError(
            f"the server at {url} answered prompt {prompt.index} without token ids, or broke off "
            f"({reason!r}). Start it with --skip-tokenizer-init, or try target.engine=openai"
        )
    return Generated(index=prompt.index, tokens=tokens, finished=reason == "stop")
