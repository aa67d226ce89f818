"""Exports that are read back: whole ones only."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specforge_core.drafts.export import read_export, write_export
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import CheckpointError
from specforge_core.types import Export

from .exports import export, same


@pytest.fixture
def written(tmp_path: Path) -> Path:
    out = tmp_path / "draft"
    write_export(export(), out, {}, shard_bytes=150)
    return out


def test_a_directory_that_is_no_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not an exported draft: config.json cannot be"):
        read_export(tmp_path / "missing")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_config_is_an_error(written: Path, content: str) -> None:
    (written / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        read_export(written)


def test_a_missing_shard_is_an_error(written: Path) -> None:
    victim = next(written.glob("model-00002*"))
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name} is missing. Export again"):
        read_export(written)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_shard_is_an_error(written: Path, keep: int) -> None:
    victim = next(written.glob("model-00001*"))
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{victim.name} is damaged: its checksum is"):
        read_export(written)


def edit_index(written: Path, **changes: Any) -> None:
    """Change the index of an export that has no checksums."""
    (written / "provenance.json").unlink(missing_ok=True)
    path = written / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_index_that_does_not_agree_is_an_error(written: Path) -> None:
    file = next(written.glob("model-00001*")).name
    edit_index(written, weight_map={"a.weight": file, "z.weight": file})
    with pytest.raises(CheckpointError, match=r"lacks tensor 'z.weight', which model.safetensors"):
        read_export(written)
    edit_index(written, weight_map=None)
    with pytest.raises(CheckpointError, match=r"has no weight_map"):
        read_export(written)


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "x" * 5000])
def test_a_name_in_an_index_that_no_file_can_have(written: Path, name: str) -> None:
    edit_index(written, weight_map={"a.weight": name})
    with pytest.raises(CheckpointError, match=r"(is damaged|is missing)") as error:
        read_export(written)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("bad", [None, math.nan])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_values_of_every_dtype_are_looked_at(
    tmp_path: Path, dtype: torch.dtype, bad: float | None
) -> None:
    weights = {"w": torch.tensor([1.0, 2.0 if bad is None else bad]).to(dtype)}
    if bad is None:
        write_export(Export(config={}, weights=weights), tmp_path / "new", {})
    (tmp_path / "config.json").write_text("{}")
    save_file(weights, tmp_path / "model.safetensors")
    if bad is None:
        assert torch.equal(read_export(tmp_path).weights["w"].float(), weights["w"].float())
    else:
        with pytest.raises(CheckpointError, match=r"'w' .* holds values that are not finite"):
            read_export(tmp_path)


def test_an_index_cannot_lead_out_of_the_directory(written: Path) -> None:
    outside = written.parent / "outside.safetensors"
    save_file({"w": torch.zeros(1)}, outside)
    edit_index(written, weight_map={"w": "../outside.safetensors"})
    with pytest.raises(CheckpointError, match=r"draft/outside.safetensors is missing"):
        read_export(written)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle, which can run code"):
        read_export(tmp_path)
    shutil.move(tmp_path / "pytorch_model.bin", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        read_export(tmp_path)


def test_a_flipped_bit_and_a_file_too_many_are_found(written: Path) -> None:
    victim = next(written.glob("model-00001*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: its checksum is .* Export again"):
        read_export(written)
    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        verify_draft(written)
    data[-1] ^= 1
    victim.write_bytes(data)
    assert str(verify_draft(written)).endswith("all files of 1 export are as they were written")
    shutil.copy(victim, written / "model-00009.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00009.safetensors was not written with"):
        read_export(written)


def test_an_export_without_checksums_is_read_and_verify_says_so(written: Path) -> None:
    path = written / "provenance.json"
    told = json.loads(path.read_text())
    assert set(told["checksums"]) == {file.name for file in written.glob("*.safetensors*")}
    del told["checksums"], told["checksum"]
    path.write_text(json.dumps(told))
    same(read_export(written), export())
    assert "no checksums are with 1 of 1 export" in str(verify_draft(written))
