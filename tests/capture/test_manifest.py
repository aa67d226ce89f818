from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from specforge_core.capture.identity import check_identity
from specforge_core.capture.manifest import CaptureManifest, Shard
from specforge_core.errors import CaptureError
from specforge_core.types import CaptureSpec, Field

from ..captured import identity

IDENTITY = identity(
    spec_version=2,
    layers=(-1, 3),
    final="pre_norm",
    fields={"hidden": ((None, 4), "float32"), "scale": ((), "float32")},
)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path):
    shards = tuple(Shard(file=f"{i}", num_samples=i, num_tokens=9, num_bytes=70) for i in (1, 2))
    manifest = CaptureManifest(identity=IDENTITY, shards=shards, prompts="p", num_prompts=3)
    manifest.write(tmp_path)
    again = CaptureManifest.read(tmp_path)
    assert again == manifest
    assert (again.num_samples, again.num_tokens) == (3, 18)
    fields = {
        "hidden": Field(shape=(None, 4), dtype="float32"),
        "scale": Field(shape=(), dtype="float32"),
    }
    assert again.identity.spec() == CaptureSpec(
        layers=(-1, 3), final="pre_norm", fields=fields, version=2
    )
    assert [f.name for f in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"format_version": 1, "odd": 2}'])
def test_a_damaged_manifest_is_an_error(content: str, tmp_path: Path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CaptureError, match=r"(?s)manifest\.json cannot be read: .*Capture again"):
        CaptureManifest.read(tmp_path)


def test_a_manifest_of_a_later_format_is_an_error(tmp_path: Path):
    later = CaptureManifest(identity=IDENTITY).model_copy(update={"format_version": 3})
    later.write(tmp_path)
    with pytest.raises(CaptureError, match=r"format 3, and this version reads formats up to 2\."):
        CaptureManifest.read(tmp_path)


# as version 0.1.0 wrote it
OLD = """{
 "format_version": 1,
 "identity": {
  "strategy": "tiny",
  "strategy_package": "specforge-tiny 0.1.0",
  "core_version": "0.1.0",
  "spec_version": 1,
  "layers": [1],
  "final": "none",
  "fields": {"hidden": [[null, 4], "float32"]},
  "target": "target",
  "target_revision": null,
  "target_fingerprint": "t",
  "tokenizer_fingerprint": "k",
  "chat_template_fingerprint": "c",
  "hidden_size": 4,
  "num_layers": 6,
  "vocab_size": 100,
  "max_length": 64
 },
 "complete": true,
 "shards": [{"file": "shard-00000.safetensors", "num_samples": 2, "num_tokens": 9, "num_bytes": 7}],
 "num_skipped": 1,
 "token_counts": "token_counts.safetensors",
 "prompts": "p",
 "num_prompts": 3
}
"""


def test_a_manifest_of_0_1_0_is_read_and_fits_a_spec_that_asks_no_more(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(OLD)
    manifest = CaptureManifest.read(tmp_path)
    fields: dict[str, tuple[tuple[int | None, ...], str]] = {"hidden": ((None, 4), "float32")}
    expected = identity(fields=fields)
    check_identity(manifest.identity, expected, tmp_path, resume=True)
    assert (manifest.num_samples, manifest.num_skipped, manifest.complete) == (2, 1, True)
    more = expected.model_copy(update={"logsumexp": True})
    with pytest.raises(CaptureError, match="log-sum-exp: False in the capture, True in this run"):
        check_identity(manifest.identity, more, tmp_path)


def test_a_write_that_fails_keeps_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = CaptureManifest(identity=IDENTITY)
    old.write(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        old.model_copy(update={"complete": True}).write(tmp_path)
    assert CaptureManifest.read(tmp_path) == old
    assert [f.name for f in tmp_path.iterdir()] == ["manifest.json"]
