"""What a capture directory says about itself."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import CaptureError
from ..files import write_file
from ..types import CaptureSpec, Field, FinalState

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
READABLE = (1, 2)  # 1: before specs could ask for next_tokens and logsumexp


class Frozen(BaseModel):
    """Base of what is written to disk: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Frozen):
    """One finished shard file."""

    file: str
    num_samples: int
    num_tokens: int
    num_bytes: int  # of the file, to notice truncation without reading it


class CaptureIdentity(Frozen):
    """What must agree between a capture and the run that trains on it."""

    strategy: str  # that captured, for information: another that asks for the same may train
    strategy_package: str  # distribution name and version, for information
    core_version: str  # for information
    spec_version: int
    layers: tuple[int, ...]
    final: FinalState
    next_tokens: bool = False
    logsumexp: bool = False
    fields: dict[str, tuple[tuple[int | None, ...], str]]  # name -> shape, dtype
    target: str  # its path or Hugging Face id, for information
    target_revision: str | None
    target_fingerprint: str  # of the target's config and of a few of its weights
    tokenizer_fingerprint: str
    chat_template_fingerprint: str  # of the template and its arguments
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_length: int

    def spec(self) -> CaptureSpec:
        """Return the CaptureSpec this capture was made with."""
        return CaptureSpec(
            layers=self.layers,
            final=self.final,
            fields={
                n: Field(shape=shape, dtype=dtype) for n, (shape, dtype) in self.fields.items()
            },
            next_tokens=self.next_tokens,
            logsumexp=self.logsumexp,
            version=self.spec_version,
        )


class CaptureManifest(Frozen):
    """The contents of manifest.json: rewritten whole, by rename, after every shard."""

    format_version: int = FORMAT_VERSION
    identity: CaptureIdentity
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    num_skipped: int = 0  # prompts the strategy's adapter turned down
    token_counts: str | None = None  # file with the supervised-token counts, [V] int64
    prompts: str | None = None  # fingerprint of the prompts in capture order, to resume safely
    num_prompts: int | None = None

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @classmethod
    def read(cls, directory: Path) -> CaptureManifest:
        """Read a directory's manifest.

        Raises CaptureError when there is none or it is damaged.
        """
        path = directory / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as exc:
            raise CaptureError(
                f"{directory} has no {MANIFEST}: it is not a capture. "
                f"Try: specforge capture -c RUN.yaml data.capture_dir={directory}"
            ) from exc
        except (ValidationError, OSError) as exc:
            raise CaptureError(
                f"{path} cannot be read: {exc}. Capture again into an empty directory"
            ) from exc
        if manifest.format_version not in READABLE:
            raise CaptureError(
                f"{path} is of format {manifest.format_version}, and this version reads formats "
                f"up to {FORMAT_VERSION}. Try: pip install -U specforge-core"
            )
        return manifest

    def write(self, directory: Path) -> None:
        """Replace the directory's manifest: the old or the new one is there, never half of one."""
        write_file(directory / MANIFEST, self.model_dump_json(indent=1).encode() + b"\n")
