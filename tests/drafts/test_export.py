from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.drafts.export import SHARD_BYTES, read_export, write_export
from specforge_core.errors import CheckpointError, PluginError
from specforge_core.files import temporary
from specforge_core.types import Export

from .exports import export, listing, same


def test_an_export_reads_back_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "new" / "draft"
    write_export(export(), out, {"strategy": "mine", "layers": [1, 2]})
    assert listing(out) == ["config.json", "model.safetensors", "provenance.json"]
    assert listing(out.parent) == ["draft"]
    same(read_export(out), export())
    assert "ü" in (out / "config.json").read_text(encoding="utf-8")
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["strategy"] == "mine"
    # as pip has it: the wheel of PyPI calls itself 2.13.0+cu130 besides
    assert provenance["packages"]["torch"] == version("torch")


def test_equal_exports_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_export(export(), tmp_path / name, {})
    for name in listing(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_large_exports_are_sharded_with_an_index(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    write_export(export(), out, {}, shard_bytes=150)  # a: 128 bytes, b: 128, c: 40
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index_name = "model.safetensors.index.json"
    assert listing(out) == ["config.json", *shards, index_name, "provenance.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 128 + 128 + 40}
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    same(read_export(out), export())


def test_shards_hold_as_much_as_they_may(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.zeros(25) for i in range(5)}  # 100 bytes each
    out = tmp_path / "draft"
    write_export(Export(config={}, weights=weights), out, {}, shard_bytes=200)
    sizes = [len(load_file(path)) for path in sorted(out.glob("*.safetensors"))]
    assert sizes == [2, 2, 1]
    write_export(Export(config={}, weights=weights), tmp_path / "tiny", {}, shard_bytes=10)
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) == 5


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    made = Export(
        config={**config.to_dict(), "architectures": ["LlamaForCausalLM"]},
        weights=model.state_dict(),
    )
    for limit in (SHARD_BYTES, 2000):
        write_export(made, tmp_path / "llama", {}, force=True, shard_bytes=limit)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded[name], tensor)


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    weights = {"top": whole[:3], "bottom": whole[3:], "again": whole[:3], "turned": whole.t()}
    write_export(Export(config={}, weights=weights), tmp_path / "draft", {})
    same(read_export(tmp_path / "draft"), Export(config={}, weights=weights))


def test_an_earlier_export_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    write_export(export(0), out, {}, shard_bytes=150)
    with pytest.raises(CheckpointError, match=r"already holds an export. Replace it with --force"):
        write_export(export(1), out, {})
    same(read_export(out), export(0))
    write_export(export(1), out, {}, force=True)
    same(read_export(out), export(1))
    assert listing(out) == ["config.json", "model.safetensors", "provenance.json"]
    assert listing(tmp_path) == ["draft"]


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    write_export(export(), out, {})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty and not an export \(notes.txt\)"):
        write_export(export(1), out, {}, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    model = tmp_path / "model"  # a model that is no export has the same file names
    model.mkdir()
    save_file({"w": torch.zeros(2)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not an export \(no provenance.json\)"):
        write_export(export(), model, {}, force=True)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match=r"is no folder. Choose another place with -o"):
        write_export(export(), file, {}, force=True)


def test_an_empty_directory_and_a_killed_exports_rest_are_no_hindrance(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    out.mkdir()
    rest = temporary(out)
    rest.mkdir()
    (rest / "model.safetensors").write_bytes(b"half")
    write_export(export(), out, {})
    same(read_export(out), export())
    assert listing(tmp_path) == ["draft"]


@contextmanager
def small_files() -> Iterator[None]:
    """Make writing fail as on a full disk, a few kilobytes into a file.

    No fixture: pytest's own output may go to a file, which the limit would hit too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    large = Export(config={}, weights={"w": torch.zeros(4096)})
    message = (
        r"draft cannot be written: File too large\. Raise the limit .*, or choose another place"
    )
    with small_files(), pytest.raises(CheckpointError, match=message):
        write_export(large, out, {})
    assert listing(tmp_path) == []
    write_export(export(), out, {})
    with small_files(), pytest.raises(CheckpointError, match="draft cannot be written"):
        write_export(large, out, {}, force=True)
    same(read_export(out), export())
    assert listing(tmp_path) == ["draft"]


def test_what_cannot_serve_or_be_saved_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    broken = Export(config={}, weights={"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(CheckpointError, match=r"tensor 'w' holds values that are not finite"):
        write_export(broken, out, {})
    with pytest.raises(PluginError, match=r"export has no weights"):
        write_export(Export(config={}, weights={}), out, {})
    with pytest.raises(PluginError, match=r"config.json of the export is not JSON: .*dtype"):
        write_export(Export(config={"dtype": torch.bfloat16}, weights=export().weights), out, {})
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("file/below", "Not a directory"),
    ],
)
def test_a_place_that_there_cannot_be_is_one_message(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"cannot be written: {why}") as error:
        write_export(export(), tmp_path / name, {})
    assert len(str(error.value)) < 1000
    assert listing(tmp_path) == ["file"]
