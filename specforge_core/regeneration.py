"""The options of `specforge regenerate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from .section import SEEDS, Section, Temperature


class RegenerateConfig(Section):
    """How the target answers prompts itself."""

    prompts: tuple[Path, ...] = Field((), description="Files of prompts, as `data.train`.")
    batch_size: int = Field(16, gt=0, le=4096, description="Answers at once, over all servers.")
    max_new_tokens: int = Field(512, gt=0, le=10**6)
    temperature: Temperature = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    keep_unfinished: bool = Field(False, description="Keep answers cut off by max_new_tokens.")
    seed: int = Field(0, ge=0, le=SEEDS)

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_is_enough(cls, prompts: object) -> object:
        return (prompts,) if isinstance(prompts, str) else prompts

    @model_validator(mode="before")
    @classmethod
    def _urls_moved(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "urls" not in raw:
            return raw
        if raw["urls"]:
            raise ValueError(
                "urls is not a key any more: servers are an engine, which specforge-openai brings. "
                "Take it out, and for servers try: target.engine=openai "
                f"target.options.urls=[{','.join(map(str, raw['urls']))}]"
            )
        return {key: value for key, value in raw.items() if key != "urls"}  # as 0.1 stored it
