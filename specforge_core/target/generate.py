"""Answers of a model of transformers, batched and left-padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..draws import draws_of
from ..types import Generated, GenerateOptions, Prompt


class _Draw(LogitsProcessor):
    """Draws each row's next token by one uniform number of that row's own generator.

    generate() would draw all rows by one generator, so that an answer depended on its batch.
    """

    def __init__(self, prompts: Sequence[Prompt], options: GenerateOptions) -> None:
        self._options = options
        self._generators = [draws_of(options.seed, prompt.index) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] in which only the drawn token is possible."""
        probs = torch.softmax(scores.float() / self._options.temperature, dim=-1)
        ordered, tokens = probs.sort(dim=-1, descending=True)
        below = ordered.cumsum(dim=-1) - ordered  # what is more likely
        ordered = ordered.masked_fill(below >= self._options.top_p, 0.0)
        ends = ordered.cumsum(dim=-1)
        drawn = [torch.rand((), generator=generator) for generator in self._generators]
        at = torch.stack(drawn).to(scores.device)[:, None] * ends[:, -1:]
        place = torch.searchsorted(ends, at, right=True).clamp(max=scores.shape[1] - 1)
        token = tokens.gather(1, place)
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


@torch.inference_mode()
def answer_batch(
    model: Any, prompts: Sequence[Prompt], options: GenerateOptions
) -> list[Generated]:
    """Continue every prompt; an answer ends in one of `eos`, unless it is cut off."""
    rows = [prompt.input_ids.tolist() for prompt in prompts]
    longest = max(map(len, rows))
    pad = min(options.eos, default=0)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    # a config of its own: the model's has what its authors recommend, a repetition penalty, ...
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(options.eos) or None,
        pad_token_id=pad,
        do_sample=False,
    )
    processors = LogitsProcessorList([_Draw(prompts, options)] if options.temperature > 0 else [])
    before, model.generation_config = model.generation_config, config
    try:
        found = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
        )
    finally:
        model.generation_config = before
    answers = found[:, longest:].tolist()
    return [_cut(p.index, tokens, options) for p, tokens in zip(prompts, answers, strict=True)]


def _cut(index: int, tokens: list[int], options: GenerateOptions) -> Generated:
    end = next((i for i, token in enumerate(tokens) if token in options.eos), None)
    kept = tokens[: options.max_new_tokens if end is None else end + 1]
    return Generated(index=index, tokens=tuple(kept), finished=end is not None)
