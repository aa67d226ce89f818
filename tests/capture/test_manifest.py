from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from specforge_core.capture.identity import check_identity
from specforge_core.capture.manifest import CaptureManifest, Shard
from specforge_core.capture.store import ShardReader
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
    with pytest.raises(CaptureError, match=r"(?s)manifest\.json cannot be read: .*capture again"):
        CaptureManifest.read(tmp_path)


def test_a_manifest_of_a_later_format_is_an_error(tmp_path: Path):
    later = CaptureManifest(identity=IDENTITY).model_copy(update={"format_version": 5})
    later.write(tmp_path)
    with pytest.raises(CaptureError, match=r"format 5, and this version reads formats up to 4\."):
        CaptureManifest.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": True}, "its checksum is"),
        ({"format_version": 3}, "its checksum is"),
        ({"checksum": "0" * 32}, "its checksum is"),
        ({"checksum": None}, "its checksum is"),
        ({"more": 1}, "its checksum is"),
        ({}, "it has no checksum of itself"),
    ],
)
def test_a_manifest_whose_values_were_changed_is_found(
    change: dict[str, object], message: str, tmp_path: Path
):
    """Another fingerprint is one that another capture may have: only a checksum tells."""
    CaptureManifest(identity=IDENTITY).write(tmp_path)
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw))  # laid out otherwise
    CaptureManifest.read(tmp_path)
    if not change:
        del raw["checksum"]
    path.write_text(json.dumps(raw | change))
    with pytest.raises(CaptureError, match=rf"manifest\.json cannot be read: {message}"):
        CaptureManifest.read(tmp_path)
    raw["identity"]["target_fingerprint"] = "another"
    path.write_text(json.dumps(raw | change))
    with pytest.raises(CaptureError, match=rf"manifest\.json cannot be read: {message}"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": "yes"}, "complete: Input should be a valid boolean"),
        ({"num_skipped": -1}, "num_skipped: Input should be greater than or equal to 0"),
        ({"num_skipped": 1.0}, "num_skipped: Input should be a valid integer"),
        ({"num_skipped": 10**30}, "num_skipped"),
        ({"num_prompts": 4}, "2 samples and 1 skipped prompts do not make 4 prompts"),
        ({"num_prompts": 2}, "2 samples and 1 skipped prompts do not make 2 prompts"),
        ({"token_counts": "../counts.safetensors"}, "token_counts: String should match"),
        ({"token_counts": "link.safetensors"}, "is a link to a file outside of"),
        ({"odd": 1}, "odd is unknown"),
        ({"shards": {}}, "shards: Input should be a valid"),
        ({"format_version": "3"}, "format_version: Input should be a valid integer"),
        ({"shards.num_samples": 0}, r"shards\.0\.num_samples: Input should be greater than 0"),
        ({"shards.num_samples": -1}, r"shards\.0\.num_samples: Input should be greater than 0"),
        ({"shards.num_samples": "2"}, r"shards\.0\.num_samples: Input should be a valid integer"),
        ({"shards.file": "../outside.safetensors"}, r"shards\.0\.file: String should match"),
        ({"shards.file": "/etc/hosts"}, r"shards\.0\.file: String should match"),
        ({"shards.file": "a\0b"}, r"shards\.0\.file: String should match"),
        ({"shards.file": ".."}, r"shards\.0\.file: String should match"),
        ({"shards.file": "link.safetensors"}, "is a link to a file outside of"),
        ({"shards.checksum": "abc"}, r"shards\.0\.checksum: String should match"),
        ({"identity.hidden_size": 0}, r"identity\.hidden_size: Input should be greater than 0"),
        ({"identity.fields": {"x": [[-1], "int64"]}}, "identity.fields.x"),
        ({"identity.layers": "1"}, r"identity\.layers: Input should be a valid"),
        ({"identity.layers": [-4]}, "identity: layer -4 of a target of 6 layers"),
        ({"identity.layers": [6]}, "identity: layer 6 of a target of 6 layers"),
        ({"shards": "twice"}, "it lists a shard twice"),
    ],
)
def test_a_manifest_is_read_strictly(change: dict[str, object], message: str, tmp_path: Path):
    (tmp_path / "capture").mkdir()
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / "capture" / "link.safetensors").symlink_to(tmp_path / "outside")
    raw = json.loads(OLD)
    for name, value in change.items():
        section, _, key = name.rpartition(".")
        place = raw["shards"][0] if section == "shards" else raw[section] if section else raw
        place[key] = raw["shards"] * 2 if value == "twice" else value
    (tmp_path / "capture" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CaptureError, match=rf"(?s)manifest\.json cannot be read: .*{message}"):
        CaptureManifest.read(tmp_path / "capture")


@pytest.mark.parametrize("code", ["utf-8", "utf-16"])
def test_a_key_of_a_manifest_that_is_there_twice_is_named_with_its_lines(tmp_path: Path, code: str):
    text = json.dumps(json.loads(OLD), indent=1)
    end = text.index('"num_tokens"')
    line = text.count("\n", 0, text.index('"num_samples"')) + 1
    text = f'{text[:end]}"num_samples":\n7, {text[end:]}'
    (tmp_path / "manifest.json").write_text(text, encoding=code)
    said = rf"cannot be read: the key 'num_samples' is there twice \(lines {line} and {line + 1}\)"
    with pytest.raises(CaptureError, match=said):
        CaptureManifest.read(tmp_path)


def test_a_link_inside_of_a_capture_is_followed(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(OLD)
    (tmp_path / "real").write_bytes(b"1234567")
    (tmp_path / "shard-00000.safetensors").symlink_to("real")
    assert CaptureManifest.read(tmp_path).num_samples == 2


def test_a_link_to_itself_is_a_damaged_capture(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(OLD)
    (tmp_path / "shard-00000.safetensors").symlink_to("shard-00000.safetensors")
    manifest = CaptureManifest.read(tmp_path)
    with pytest.raises(CaptureError, match=r"shard-00000\.safetensors"):
        ShardReader(tmp_path, manifest)


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
