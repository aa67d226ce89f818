"""What a capture directory says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import to_json

from ..checksums import SEAL, check_seal, sealed
from ..documents import parse_json, read_document, why_invalid
from ..errors import CaptureError
from ..files import inside, write_file
from ..types import CaptureSpec, Field, FinalState

MANIFEST = "manifest.json"
AGAIN = (
    "Restore it from a copy, or capture again: specforge capture -c RUN.yaml "
    "data.capture_dir=EMPTY_DIRECTORY"
)
FORMAT_VERSION = 4
DIGITS = 12  # of a fingerprint that are shown, unless another has the same
# 1: before specs could ask for next_tokens and logsumexp; 2: before there were checksums;
# 3: before the manifest had one of itself
READABLE = (1, 2, 3, 4)

Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Positive = Annotated[int, pydantic.Field(gt=0, lt=2**63)]
FileName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
Checksum = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{32}$")]


class Frozen(BaseModel):
    """Base of what is written to disk: no unknown keys, no other types, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(Frozen):
    """One finished shard file."""

    file: FileName
    num_samples: Positive
    num_tokens: Count
    num_bytes: Positive  # of the file, to notice truncation without reading it
    checksum: Checksum | None = None  # XXH3-128 of the file; None: of a version that wrote none
    table_checksum: Checksum | None = None  # of its row table, which has one of every sample


class CaptureIdentity(Frozen):
    """What must agree between a capture and the run that trains on it."""

    strategy: str  # that captured: another that asks for no more may train
    strategy_package: str  # distribution name and version, for information
    core_version: str  # for information
    spec_version: int
    layers: tuple[int, ...]
    final: FinalState
    next_tokens: bool = False
    logsumexp: bool = False
    fields: dict[str, tuple[tuple[Count | None, ...], str]]  # name -> shape, dtype
    target: str  # its path or Hugging Face id, for information
    target_revision: str | None
    target_fingerprint: str  # of the target's config and of a few of its weights
    tokenizer_fingerprint: str
    chat_template_fingerprint: str  # of the template and its arguments
    hidden_size: Positive
    num_layers: Positive
    vocab_size: Positive
    max_length: Positive

    @model_validator(mode="after")
    def _has_the_layers(self) -> CaptureIdentity:
        if wrong := [layer for layer in self.layers if not -1 <= layer < self.num_layers]:
            raise ValueError(f"layer {wrong[0]} of a target of {self.num_layers} layers")
        return self

    def shown(self, name: str, other: CaptureIdentity) -> str:
        """Return the value of a field as a message has it beside that of another identity."""
        value = getattr(self, name)
        if name.endswith("_fingerprint") and getattr(other, name)[:DIGITS] != value[:DIGITS]:
            value = value[:DIGITS]
        if name == "target_fingerprint":
            revision = f" at revision {self.target_revision}" if self.target_revision else ""
            return f"{self.target}{revision} ({value})"
        return str(list(value)) if isinstance(value, tuple) else str(value)

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
    """The contents of manifest.json: rewritten whole, by rename, after every shard.

    There also with the checksum of all this.
    """

    format_version: int = FORMAT_VERSION
    identity: CaptureIdentity
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    num_skipped: Count = 0  # prompts the strategy's adapter turned down
    token_counts: FileName | None = None  # file with the supervised-token counts, [V] int64
    token_counts_checksum: Checksum | None = None
    prompts: str | None = None  # fingerprint of the prompts in capture order, to resume safely
    num_prompts: Count | None = None
    data: str | None = None  # what tells data.train from others at a glance, where it is files

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> CaptureManifest:
        names = [shard.file for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("it lists a shard twice")
        done = self.num_samples + self.num_skipped
        if self.num_prompts is not None and (
            done > self.num_prompts or (self.complete and done < self.num_prompts)
        ):
            raise ValueError(
                f"{self.num_samples} samples and {self.num_skipped} skipped prompts do not make "
                f"{self.num_prompts} prompts"
            )
        return self

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
            raw = parse_json(read_document(path))
            _check_version(path, raw)
            manifest = cls.model_validate_json(to_json(_unsealed(raw)))
            for name in (*(shard.file for shard in manifest.shards), manifest.token_counts):
                if name is not None:
                    inside(directory, name)
        except NotADirectoryError as exc:
            raise CaptureError(f"{directory} is a file. Try: data.capture_dir=DIRECTORY") from exc
        except FileNotFoundError as exc:
            raise CaptureError(
                f"{directory} has no {MANIFEST}: it is not a capture. "
                f"Try: specforge capture -c RUN.yaml data.capture_dir={directory}"
            ) from exc
        except (ValueError, RecursionError, OSError) as exc:
            why = why_invalid(exc) if isinstance(exc, ValidationError) else str(exc)
            raise CaptureError(f"{path} cannot be read: {why}. {AGAIN}") from exc
        return manifest

    def write(self, directory: Path) -> None:
        """Replace the directory's manifest: the old or the new one is there, never half of one."""
        document = sealed(self.model_dump(mode="json"))
        write_file(directory / MANIFEST, json.dumps(document, indent=1).encode() + b"\n")


def _unsealed(told: Any) -> Any:
    """Return what a manifest says without its checksum; ValueError where that is another."""
    if not isinstance(told, dict):
        return told
    if not check_seal(told) and told.get("format_version") == FORMAT_VERSION:
        raise ValueError(f"it has no {SEAL} of itself")
    return {key: value for key, value in told.items() if key != SEAL}


def _check_version(path: Path, told: Any) -> None:
    """Raise CaptureError for a later format, whose keys need not be known here."""
    version = told.get("format_version", 1) if isinstance(told, dict) else 1
    if type(version) is int and version not in READABLE:
        raise CaptureError(
            f"{path} is of format {version}, and this version reads formats up to "
            f"{FORMAT_VERSION}. Try: pip install -U specforge-core"
        )
