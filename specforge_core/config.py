"""The settings of a run: the core's sections."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from .fitted import Fitted, check_batch_tokens
from .regeneration import RegenerateConfig as RegenerateConfig
from .section import (
    MANY,
    SEEDS,
    MayChange as MayChange,
    PathText,
    Section as Section,
    StrategyConfig as StrategyConfig,
    Temperature,
    expand,
    fits,
)
from .watched import a_part, check_grows, check_watched

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class TargetConfig(Section):
    """The model that drafts are trained for, and what runs it."""

    path: PathText = Field(description="Directory or Hugging Face id of the target model.")
    revision: str | None = Field(None, description="Revision of a Hugging Face id.")
    engine: str = Field("transformers", description="What runs the target.")
    dtype: Dtype = Field(
        "auto",
        description="Weights' dtype; auto is the checkpoint's own, but float32 on a CPU on which "
        "bfloat16 is slow.",
    )
    device: str = Field("auto", description="auto is the GPU of this rank, or the CPU.")
    batch_tokens: int = Field(
        8192, gt=0, le=MANY, description="Tokens the target runs at once, padding among them."
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the engine.")


class DataConfig(Section):
    """What is trained on.  With `capture_dir` training is offline, without it online."""

    train: tuple[str, ...] = Field(
        (),
        description="Conversations: files (JSONL, JSON, Parquet, Arrow, packed), folders (of "
        "splits train), patterns, Hugging Face data sets (NAME, NAME:SPLIT, NAME:CONFIG:SPLIT).",
    )
    mix: tuple[float, ...] = Field(
        (),
        description="The sources' weights, one for each of `train`: conversations are taken in "
        "this proportion until a source ends. If not set: all, one source behind the other.",
    )
    validation: float | tuple[str, ...] = Field(
        (),
        description="Never trained on: conversations of their own (as `train`), or the part of "
        "`train` that is held out, between 0 and 1.",
    )
    capture_dir: Path | None = Field(None, description="Where `capture` writes and `train` reads.")
    follow: bool = Field(False, description="Train while `capture_dir` is still being written.")
    max_length: int = Field(
        2048,
        gt=1,
        le=MANY,
        description="Longest sample, in tokens; the target's positions bound it, too.",
    )
    too_long: Literal["truncate", "skip", "raise"] = Field(
        "truncate",
        description="What to do with a longer sample; prompts to be answered are never cut.",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="What a bad row does; skipped ones are counted by reason."
    )
    shuffle_window: int | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Rows that are shuffled together, one such group behind the other. If not "
        "set: all; of large files of JSON lines, read in a mixed order, the first epoch has groups "
        "of 1024. With such groups and `train.max_steps` online training begins when the first one "
        "is tokenized, unless its data grows or `data.cache` is null.",
    )
    limit: int | None = Field(None, gt=0, le=MANY, description="Use only the first conversations.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template: enable_thinking, ..."
    )
    now: datetime = Field(
        datetime(2026, 1, 1), ge=datetime(2000, 1, 1), description="Today, for chat templates."
    )
    cache: Path | None = Field(
        Path("~/.cache/specforge/tokens"),
        validate_default=True,
        description="Where the tokens of large data are kept for later runs; null: nowhere.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="Processes that tokenize large data. If not set: one on each core; 0 and 1: "
        "none.",
    )
    ignore_fields: tuple[str, ...] = Field(
        (), description="Fields of rows and messages that mean nothing for the training."
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_is_enough(cls, train: object) -> object:
        return (train,) if isinstance(train, str) else train

    @field_validator("train", "validation")
    @classmethod
    def _files_fit(cls, train: float | tuple[str, ...]) -> float | tuple[str, ...]:
        if isinstance(train, float):
            return a_part(train)
        return tuple(fits(expand(path)) for path in train)

    @model_validator(mode="after")
    def _each_has_a_weight(self) -> DataConfig:
        if self.mix and len(self.mix) != len(self.train):
            raise ValueError(
                f"data.mix has {len(self.mix)} weights, and data.train {len(self.train)} sources: "
                "give each one"
            )
        if not all(0 < weight <= MANY for weight in self.mix):
            raise ValueError("a weight in data.mix is more than 0: leave out a source without one")
        return self


class CacheConfig(Section):
    """Where states that were captured online are kept, for later epochs and runs."""

    dir: Path = Field(description="Folder; any number of runs and ranks may share it.")
    max_bytes: int = Field(gt=0, le=2**60, description="It never holds more; the oldest go first.")


class CaptureConfig(Section):
    """How the target's states are stored, or handed to the trainer."""

    shard_tokens: int = Field(131072, gt=0, le=MANY, description="Tokens in one shard file, about.")
    window: int = Field(
        32,
        gt=0,
        le=4096,
        description="Prompts whose lengths are grouped together. Online, two windows are held: "
        "one is trained on, one captured.",
    )
    prefetch: int = Field(2, gt=0, le=1024, description="Batches made ready ahead of need.")
    cache: CacheConfig | None = Field(
        None,
        description="`{dir: DIR, max_bytes: N}`: keep what online training captures there, up to "
        "N bytes (the oldest are removed first), and read it when it is met again.",
    )


class TrainConfig(Fitted):
    """The optimizer, its schedule, and when to save."""

    init_from: Path | None = Field(
        None, description="Start from these weights: a run, a checkpoint, or an exported draft."
    )
    max_steps: int | None = Field(
        None, gt=0, le=MANY, description="Optimizer steps; overrides epochs."
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        le=1e8,
        description="The training ends by then, at the end of its schedule however many steps "
        "it did; counts over resumes, without the loading.",
    )
    epochs: float = Field(1.0, gt=0, le=1e6, description="Passes over the data.")
    batch_size: int = Field(1, gt=0, le=4096, description="Samples per micro-batch and rank.")
    accumulate: int = Field(1, gt=0, le=4096, description="Micro-batches per optimizer step.")
    learning_rate: float = Field(6e-4, gt=0, le=1e3, description="Peak learning rate.")
    optimizer: str = Field(
        "adamw", description="adamw, muon (for the hidden layers' matrices), or a plugin's."
    )
    muon_learning_rate: float = Field(6e-3, gt=0, le=1e3, description="Peak learning rate of Muon.")
    schedule: str = Field(
        "cosine", description="After the warm-up: constant, cosine, wsd, or a plugin's."
    )
    warmup_ratio: float = Field(0.04, ge=0, le=1, description="Part of the steps that warm up.")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="Part of the steps wsd decays over.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Last learning rate over the peak.")
    weight_decay: float = Field(0.01, ge=0, le=1e3)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, description="At most, of a step's gradient.")
    max_bad_steps: int = Field(
        3,
        ge=0,
        le=10**9,
        description="Steps in a row that may be left out because their loss or gradient is not "
        "finite; one more ends the run.",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="auto is bfloat16 on a GPU and on a CPU that is fast in it, else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="torch.compile the draft's units; auto does so on a GPU."
    )
    threads: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="CPU threads of one operation. If not set: OMP_NUM_THREADS, or all cores, "
        "half of them beside a target on the CPU, at most 4 with a GPU.",
    )
    save_every: int = Field(500, gt=0, le=MANY, description="Steps between checkpoints.")
    keep: int = Field(2, gt=0, le=MANY, description="Checkpoints kept.")
    log_every: int = Field(10, gt=0, le=MANY, description="Steps between logged metrics.")
    profile: bool = Field(False, description="Wait after each phase, so its logged time is exact.")
    seed: int = Field(0, ge=0, le=SEEDS)

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both are 0 or more, and less than 1")
        return betas


class EvalConfig(Section):
    """What `specforge eval`, and training every `train.eval_every` steps, measure."""

    prompts: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Prompt set name -> what `data.train` takes: one or a list of them.",
    )
    limit: int | None = Field(None, gt=0, le=MANY, description="Prompts of each set.")
    max_new_tokens: int = Field(128, gt=0, le=10**6)
    max_draft_tokens: int | None = Field(
        None, gt=0, le=1024, description="Fewer than the draft allows."
    )
    temperature: Temperature = Field(0.0, ge=0, le=100)
    dtype: Dtype = Field("float32", description="Of target and draft; float32 is exact.")
    device: str | None = Field(
        None,
        description="Where; if not set: target.device. Set, an evaluation in training is a process "
        "of its own on this device, and training goes on meanwhile.",
    )
    compare: bool = Field(True, description="Also run the target alone: lossless check, speed-up.")
    seed: int = Field(0, ge=0, le=SEEDS)

    @field_validator("prompts", mode="before")
    @classmethod
    def _listed(cls, prompts: Any) -> Any:
        if not isinstance(prompts, dict):
            return prompts
        if empty := [name for name, sources in prompts.items() if sources in ("", [], ())]:
            raise ValueError(f"{empty[0]!r} names no file")
        return {
            name: (str(found),) if isinstance(found, str | Path) else found
            for name, found in prompts.items()
        }

    @field_validator("prompts")
    @classmethod
    def _files_fit(cls, prompts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(fits(expand(x)) for x in found) for name, found in prompts.items()}


class RunConfig(Section):
    """One run, complete and validated before anything is built."""

    target: TargetConfig
    strategy: SerializeAsAny[StrategyConfig]
    output_dir: Path = Field(Path("outputs/run"), description="Checkpoints, metrics, reports.")
    data: DataConfig = DataConfig()
    capture: CaptureConfig = CaptureConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    regenerate: RegenerateConfig = RegenerateConfig()
    plugins: dict[str, SerializeAsAny[Section]] = Field(
        default_factory=dict, description="Sections of plugins, by name; off unless named."
    )

    @model_validator(mode="after")
    def _the_sections_agree(self) -> RunConfig:
        data = self.data
        if data.follow and data.capture_dir is None:
            raise ValueError("data.follow needs data.capture_dir, the directory to follow")
        check_batch_tokens(self.train, longest=data.max_length, follows=data.follow)
        check_watched(self.train, validation=data.validation != (), prompts=bool(self.eval.prompts))
        check_grows(
            self.train,
            online=data.capture_dir is None,
            steps=self.train.max_steps is not None,
            prompts=bool(self.regenerate.prompts),
        )
        return self
