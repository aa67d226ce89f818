"""What every measurement of one diagnosis shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from specforge_core.config import RunConfig
from specforge_core.errors import ConfigError
from specforge_core.evaluate.bench import EvalPrompt
from specforge_core.evaluate.run import load_prompt_sets
from specforge_core.strategy import Strategy
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.types import TargetInfo

Answers: TypeAlias = "Sequence[tuple[int, ...]]"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A run, its target and its held-out prompts."""

    run: RunConfig
    strategy: Strategy
    target: TargetInfo
    tokenizer: PreTrainedTokenizerBase
    prompts: tuple[EvalPrompt, ...]

    @classmethod
    def load(cls, run: RunConfig, strategy: Strategy, target: TargetInfo) -> Inputs:
        """Tokenize the prompts; the run's evaluation becomes greedy and drafts whole chains.

        Raises ConfigError for fewer than two prompts, which allow no bounds.
        """
        changes = {"temperature": 0.0, "max_draft_tokens": None, "compare": False}
        run = run.model_copy(update={"eval": run.eval.model_copy(update=changes)})
        tokenizer = load_tokenizer(run.target)
        sets = load_prompt_sets(run, strategy, tokenizer, target)
        prompts = tuple(prompt for found in sets.values() for prompt in found)
        if len(prompts) < 2:
            raise ConfigError(
                f"{len(prompts)} prompt says nothing of chance: the doctor needs 2 at least, and "
                "some 50 to tell 3 %. Try: eval.limit=50, or more in eval.prompts"
            )
        return cls(run, strategy, target, tokenizer, prompts)


def free_memory() -> None:
    """Give what this process no longer uses of a GPU to an engine in another one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
