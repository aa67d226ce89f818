from __future__ import annotations

import ctypes
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.capture.writer import ShardWriter
from specforge_core.errors import CaptureError
from specforge_core.files import TEMPORARY, temporary
from specforge_core.testing.forked import python
from specforge_core.testing.runs import finish
from specforge_core.types import Sample

from ..captured import identity

IDENTITY = identity(fields={"hidden": ((None, 4), "float32")})


def sample(index: int, length: int = 5) -> Sample:
    return {"hidden": torch.full((length, 4), float(index))}


def stored(directory: Path) -> list[int]:
    reader = ShardReader(directory, CaptureManifest.read(directory))
    indices = [reader.prompt_index(i) for i in range(len(reader))]
    for i, index in enumerate(indices):
        assert torch.equal(reader[i]["hidden"], sample(index)["hidden"])
    return indices


def write(directory: Path, count: int, skip: int = 0) -> None:
    """Write samples and fail before the capture is closed."""
    with ShardWriter(directory, IDENTITY, 10) as writer:
        for index in range(count):
            writer.add(index, sample(index))
            if index < skip:
                writer.skip(100 + index)
        raise KeyboardInterrupt


def test_the_manifest_lists_finished_shards_and_completeness_comes_last(tmp_path: Path):
    with ShardWriter(tmp_path / "new" / "capture", IDENTITY, 10) as writer:
        writer.begin(torch.ones(100, dtype=torch.int64))
        assert CaptureManifest.read(writer.directory).token_counts is not None
        for index in range(5):
            writer.add(index, sample(index))
        before = CaptureManifest.read(writer.directory)
        assert not before.complete
        after = writer.close()
    assert after == CaptureManifest.read(writer.directory)
    assert after.complete
    assert [(s.num_samples, s.num_tokens) for s in after.shards] == [(2, 10), (2, 10), (1, 5)]
    assert (after.num_samples, after.num_tokens) == (5, 25)


def test_an_unfinished_capture_goes_on_after_its_last_finished_shard(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 5, skip=5)  # two shards, and a sample that is lost
    with ShardWriter(tmp_path, IDENTITY, 10) as writer:
        assert writer.done == {0, 1, 2, 3, 100, 101, 102}
        assert writer.manifest.num_skipped == 3
        for index in (4, 5):
            writer.add(index, sample(index))
        for index in (103, 104):
            writer.skip(index)
        manifest = writer.close()
    assert stored(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert manifest.num_skipped == 5


def test_two_writers_of_one_directory_are_refused(tmp_path: Path):
    with (
        ShardWriter(tmp_path, IDENTITY, 10),
        pytest.raises(CaptureError, match="another process is capturing into"),
    ):
        ShardWriter(tmp_path, IDENTITY, 10)
    with ShardWriter(tmp_path, IDENTITY, 10) as writer:  # free again
        assert writer.done == set()


def test_another_capture_in_the_directory_is_refused(tmp_path: Path):
    with ShardWriter(tmp_path, IDENTITY, 10, prompts="a", num_prompts=3) as writer:
        writer.begin(torch.ones(100, dtype=torch.int64))
    other = IDENTITY.model_copy(update={"layers": (2,)})
    with pytest.raises(CaptureError, match=r"captured layers: \[1\] in the capture, \[2\] in this"):
        ShardWriter(tmp_path, other, 10)
    longer = IDENTITY.model_copy(update={"max_length": 32})
    with pytest.raises(CaptureError, match=r"data\.max_length: 64 in the capture, 32 in this run"):
        ShardWriter(tmp_path, longer, 10)
    with pytest.raises(CaptureError, match=r"begun with other prompts.*\(3 prompts then, 5 now\)"):
        ShardWriter(tmp_path, IDENTITY, 10, prompts="b", num_prompts=5)


def test_shards_without_a_manifest_are_left_alone(tmp_path: Path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"somebody's")
    with pytest.raises(CaptureError, match=r"has shard-00000\.safetensors but no manifest\.json"):
        ShardWriter(tmp_path, IDENTITY, 10)
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == b"somebody's"


def test_a_sample_that_does_not_fit_the_spec_names_its_prompt(tmp_path: Path):
    with (
        ShardWriter(tmp_path, IDENTITY, 10) as writer,
        pytest.raises(CaptureError, match="prompt 7: field 'hidden': is float64, the spec says"),
    ):
        writer.add(7, {"hidden": torch.zeros(3, 4, dtype=torch.float64)})


def test_a_capture_without_samples_is_an_error(tmp_path: Path):
    with ShardWriter(tmp_path, IDENTITY, 10) as writer:
        for index in range(3):
            writer.skip(index)
        with pytest.raises(CaptureError, match="the strategy skipped all 3 prompts"):
            writer.close()
    assert not (tmp_path / "manifest.json").exists()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError, match="file/capture cannot be written: Not a dir"):
        ShardWriter(tmp_path / "file" / "capture", IDENTITY, 10)


def temporaries(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if TEMPORARY.fullmatch(path.name)]


def fill_up(directory: Path) -> None:
    """Write samples until the disk is full, then check that the error says so."""
    with pytest.raises(CaptureError, match="cannot be written: No space left on device") as error:
        write(directory, 1000)
    kept = CaptureManifest.read(directory)
    assert 0 < kept.num_samples < 1000
    safe = f"Safe so far: {kept.num_samples} samples in {len(kept.shards)} shards. "
    assert safe in str(error.value)
    assert "run the same command again to go on" in str(error.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=65536") != 0:
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield path
    libc.umount2(str(path).encode(), 2)


def test_a_full_disk_is_one_error_and_loses_no_finished_shard(small_disk: Path):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 30000)
    fill_up(small_disk)
    assert temporaries(small_disk) == []
    before = stored(small_disk)
    filler.unlink()
    with ShardWriter(small_disk, IDENTITY, 100) as writer:
        assert writer.done == set(before)
        writer.add(len(before), sample(len(before)))
        writer.close()
    assert stored(small_disk) == [*before, len(before)]


def test_a_file_size_limit_is_one_error_and_loses_no_finished_shard(tmp_path: Path):
    source = """
        import json, resource, sys, torch
        from pathlib import Path
        from specforge_core.capture.manifest import CaptureIdentity
        from specforge_core.capture.writer import ShardWriter
        from specforge_core.errors import CaptureError

        identity = CaptureIdentity.model_validate_json(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try:
            with ShardWriter(Path(sys.argv[1]), identity, 100) as writer:
                for index, length in enumerate((50, 50, 60, 40, 1000)):
                    writer.add(index, {"hidden": torch.full((length, 4), float(index))})
                writer.close()
        except CaptureError as exc:
            print(exc)
    """
    script, capture = tmp_path / "limited.py", tmp_path / "capture"
    script.write_text(textwrap.dedent(source))
    identity = json.dumps(IDENTITY.model_dump(mode="json"))
    said = finish(python(script, str(capture), identity, env=os.environ))
    assert "shard-00002.safetensors cannot be written: File too large. Safe so far: 4 s" in said
    assert "Raise the limit on the size of files" in said
    assert CaptureManifest.read(capture).num_samples == 4
    assert temporaries(capture) == []


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 5)
    (tmp_path / "shard-00007.safetensors").write_bytes(b"not listed yet")
    temporary(tmp_path / "manifest.json").write_bytes(b"half")
    (tmp_path / ".manifest.json.mine").write_bytes(b"somebody's")
    with ShardWriter(tmp_path, IDENTITY, 10):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        ".manifest.json.mine",
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_a_link_planted_where_a_file_will_be_is_not_followed(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    capture = tmp_path / "capture"
    capture.mkdir()
    for name in ("manifest.json.tmp", ".manifest.json.tmp", "token_counts.safetensors"):
        (capture / name).symlink_to(victim)
    with ShardWriter(capture, IDENTITY, 10) as writer:
        writer.begin(torch.ones(100, dtype=torch.int64))
        writer.add(0, sample(0))
        writer.close()
    assert victim.read_bytes() == b"precious"
    assert not (capture / "token_counts.safetensors").is_symlink()


def test_a_capture_that_has_a_prompt_twice_is_not_gone_on_with(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 4)
    manifest = CaptureManifest.read(tmp_path)
    first = manifest.shards[0]
    (tmp_path / "again.safetensors").write_bytes((tmp_path / first.file).read_bytes())
    again = first.model_copy(update={"file": "again.safetensors"})
    manifest.model_copy(update={"shards": (*manifest.shards, again)}).write(tmp_path)
    with pytest.raises(CaptureError, match=r"has prompt 0 twice\. Try: specforge verify"):
        ShardWriter(tmp_path, IDENTITY, 10)
