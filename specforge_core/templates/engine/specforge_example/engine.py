"""An engine that answers prompts, and captures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specforge_core.config import TargetConfig
from specforge_core.cpu import pick_target_dtype
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.target.asked import answer_room, check_prompts
from specforge_core.target.info import load_pretrained, load_target_info
from specforge_core.types import (
    CaptureSpec,
    Generated,
    GenerateOptions,
    Prompt,
    TargetCapture,
    TargetInfo,
)


class ExampleEngine:
    """Answers one prompt at a time."""

    def __init__(self, model: Any, info: TargetInfo) -> None:
        self.model = model
        self.info = info

    @classmethod
    def load(cls, target: TargetConfig, device: torch.device) -> ExampleEngine:
        """Load the target's weights.  Raises ConfigError when that fails."""
        if target.options:
            raise ConfigError(
                f"target.options is {dict(target.options)}, and this engine has no options. "
                "Try: target.options={}"
            )
        info = load_target_info(target)
        dtype = pick_target_dtype(target.dtype, info.config.get("dtype"), device)
        model = load_pretrained(AutoModelForCausalLM, target, dtype=dtype)
        return cls(model.eval().to(device), info)

    def supports(self, spec: CaptureSpec) -> bool:
        """Say no: this engine hands out no states."""
        return False

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Raise CaptureError: this engine hands out no states."""
        raise CaptureError(
            "target.engine=example only generates, and hands out no hidden states. "
            "Try: target.engine=transformers"
        )

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Yield an answer for each prompt; the order is free."""
        check_prompts(prompts, self.info.vocab_size)
        for prompt in prompts:
            yield self._answer(prompt, options)

    def close(self) -> None:
        """Let the weights go."""
        del self.model

    def _answer(self, prompt: Prompt, options: GenerateOptions) -> Generated:
        # of the prompt's own, so that an answer hangs on no other prompt
        draw = torch.Generator().manual_seed(hash((options.seed, prompt.index)) % 2**63)
        ids = prompt.input_ids.tolist()
        tokens: list[int] = []
        for _ in range(answer_room(self.info, len(ids), options)):
            tokens.append(self._next([*ids, *tokens], options, draw))
            if tokens[-1] in options.eos:
                break
        finished = tokens[-1] in options.eos
        return Generated(index=prompt.index, tokens=tuple(tokens), finished=finished)

    @torch.no_grad()
    def _next(self, ids: list[int], options: GenerateOptions, draw: torch.Generator) -> int:
        """Return the token behind `ids`.  Simple and slow: everything is computed again."""
        given = torch.tensor([ids], device=self.model.device)
        logits = self.model(input_ids=given, use_cache=False).logits[0, -1].float()
        logits = logits[: self.info.vocab_size].cpu()
        if options.temperature == 0:
            return int(logits.argmax())
        probs, tokens = (logits / options.temperature).softmax(0).sort(descending=True)
        probs[probs.cumsum(0) - probs >= options.top_p] = 0  # what is more likely is enough
        return int(tokens[torch.multinomial(probs, 1, generator=draw)])
