"""Files and texts of any content: what comes out is a value or a SpecForgeError, in bounded time.

Each reader is given what it reads, changed in one or a few places: another value of JSON for one in
the document, a key twice, bytes cut out, turned or put in.  CORPUS has what was found this way
before, or by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.config import DataConfig
from specforge_core.data.files import open_source
from specforge_core.data.sources import read_conversations
from specforge_core.drafts.checkpoint import CHECKSUMS, checkpoints, read_state
from specforge_core.drafts.export import (
    check_place,
    read_export,
    read_provenance,
    read_serve,
    write_export,
)
from specforge_core.drafts.identity import Made
from specforge_core.drafts.load import restore
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import SpecForgeError
from specforge_core.load import apply_override, load_config, read_yaml, validate
from specforge_core.tensorfile import DTYPES, OpenFile, read_header
from specforge_core.testing.runs import load, write_run
from specforge_core.train.run import train

from .fuzzed import DEEP, HUGE, JSON, ODD, changed, places, replaced, unsealed

SECONDS = 8  # of a processor, for one input
# inputs of each file at the slow level; said by the environment, they are drawn anew every time
MANY = int(os.environ.get("SPECFORGE_FUZZ", "200"))
OVERRIDE_KEYS = (
    *("train.seed", "train.betas", "train", "strategy.name", "strategy", "target.options.a"),
    *("plugins", "plugins.tensorboard", "data.train", "eval.prompts.x", "output_dir", "", "."),
)


@dataclass(frozen=True)
class Reader:
    """A file, the reader of it, and what is true of it."""

    path: Path
    read: Callable[[], object]
    binary: bool = False  # a header of JSON behind its length

    def document(self) -> tuple[bytes, bytes]:
        """Return the JSON of the file, and what comes behind it."""
        data = self.path.read_bytes()
        if not self.binary:
            return data, b""
        size = int.from_bytes(data[:8], "little")
        return data[8 : 8 + size], data[8 + size :]

    def put(self, text: bytes, rest: bytes) -> None:
        """Write the file."""
        head = len(text).to_bytes(8, "little") if self.binary else b""
        self.path.write_bytes(head + text + rest)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    """Return the config of a run that captured, trained and exported."""
    path = tmp_path_factory.mktemp("fuzz")
    settings = {"max_steps": 1, "threads": 1}
    strategy = {"name": "linear"}
    config = write_run(path, toy_target, conversations=4, strategy=strategy, train=settings)
    train(*load(config))
    run_capture(*load(config, f"data.capture_dir={path / 'capture'}"))
    loaded, method = load(config)
    restored = restore(loaded, method, path / "run")
    export = method.export(loaded.strategy, restored.draft, restored.target, "hf")
    write_export(export, path / "export", {})
    for file in (path / "capture/manifest.json", path / "export/provenance.json"):
        file.write_bytes(unsealed(file.read_bytes()))
    bare = shutil.copytree(checkpoints(path / "run")[-1], path / "bare/checkpoints/step-00000001")
    (bare / CHECKSUMS).unlink()
    return config


def readers(config: Path) -> dict[str, Reader]:
    """Return what is read of a run's files."""
    path = config.parent
    checkpoint, bare = (checkpoints(path / name)[-1] for name in ("run", "bare"))
    shard = next((capture := path / "capture").glob("shard*.safetensors"))

    def read_capture() -> None:
        samples = ShardReader(capture, CaptureManifest.read(capture))
        for index in range(min(len(samples), 8)):
            samples[index]

    def read_rows() -> None:
        data = DataConfig(on_error="skip")
        for row in read_conversations(["x"], data, lambda *_: open_source(str(path / "row.jsonl"))):
            assert all(isinstance(message["content"], str) for message in row.messages)

    def read_tensors() -> None:
        file = OpenFile(shard)
        for entry in read_header(file).values():
            if entry.code in DTYPES and entry.shape:
                entry.rows(file, 0, min(entry.shape[0], 8))

    def read_stored_config() -> None:
        state = read_state(bare)
        validate(dict(state.config), "the stored config")

    def read_told() -> None:
        export = path / "export"
        Made.of_provenance(read_provenance(export), export)
        read_serve(export, "sglang")
        check_place(export, force=True)
        verify_draft(export)

    first = (path / "train.jsonl").read_bytes().splitlines()[0]
    (path / "row.jsonl").write_bytes(first)
    (path / "config.yaml").write_text(json.dumps(read_yaml(config)))
    return {
        "config": Reader(path / "config.yaml", lambda: load_config(path / "config.yaml")),
        "rows": Reader(path / "row.jsonl", read_rows),
        "state": Reader(bare / "state.json", read_stored_config),
        "manifest": Reader(capture / "manifest.json", read_capture),
        "header": Reader(shard, read_tensors, binary=True),
        "export": Reader(
            path / "export/config.json", lambda: restore(*load(config), path / "export")
        ),
        "weights": Reader(
            path / "export/model.safetensors", lambda: read_export(path / "export"), binary=True
        ),
        "checksums": Reader(checkpoint / "checksums.json", lambda: verify_draft(checkpoint)),
        "provenance": Reader(path / "export/provenance.json", read_told),
    }


def survives(read: Callable[[], object]) -> None:
    """Run a reader; it may say what is wrong, shortly and in time."""
    began, told = time.process_time(), "fine"
    try:
        read()
    except SpecForgeError as exc:
        told = str(exc)
    assert told.strip()
    assert len(told) < 4000
    assert time.process_time() - began < SECONDS


CORPUS = [
    *(b"", b"null", b"[]", b"3", b'"text"', b"{}", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0"),
    *(DEEP, b'{"a": ' * 50_000, HUGE, b'{"a": 1, "a": 2}', b"NaN", b'{"\\ud800": "\\ud800"}'),
    *(
        b'{"messages": ' + DEEP + b"}",
        b'{"messages": [{"role": "user", "content": [{"text": {}}]}]}',
    ),
    *(b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', b'{"__metadata__": []}'),
    *(b'{"x": []}', b'{"x": {"dtype": "Q99", "shape": [-1], "data_offsets": [0, 1e30]}}'),
    *(
        b'{"x": {"dtype": [], "shape": "8", "data_offsets": null}}',
        b'{"step": null, "positions": []}',
    ),
    *(b'{"format_version": 99}', b"a: &a [*a]", b"a: &a {a: *a}", b"a: 2024-13-45", b"a: !!x b"),
]
NAMES = ("config", "rows", "state", "manifest", "header", "export", "weights")
NAMES += ("checksums", "provenance")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_before(run: Path, name: str) -> None:
    reader = readers(run)[name]
    kept = reader.path.read_bytes()
    try:
        survives(reader.read)
        for text in CORPUS:
            reader.put(text, b"")
            survives(reader.read)
        for size in (0, 2**40, 2**64 - 1):
            reader.path.write_bytes(size.to_bytes(8, "little") + kept[8:])
            survives(reader.read)
    finally:
        reader.path.write_bytes(kept)


def late(signum: int, frame: object) -> None:
    raise AssertionError(f"it waits for something after {SECONDS} s")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file(run: Path, name: str) -> None:
    reader = readers(run)[name]
    aside = reader.path.with_name("aside")
    reader.path.rename(aside)
    before = signal.signal(signal.SIGALRM, late)
    try:
        for make in (
            os.mkfifo,
            Path.mkdir,
            lambda path: path.symlink_to("/dev/zero"),
            lambda path: path.symlink_to(path),
            lambda path: None,
        ):
            make(reader.path)
            if name == "checksums" and not os.path.lexists(reader.path):
                continue  # a version wrote none
            signal.alarm(SECONDS)
            with pytest.raises(SpecForgeError):
                reader.read()
            signal.alarm(0)
            if reader.path.is_dir():
                reader.path.rmdir()
            reader.path.unlink(missing_ok=True)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        aside.rename(reader.path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state", "manifest", "header", "checksums", "provenance"])
def test_every_field_with_every_odd_value(run: Path, name: str) -> None:
    reader = readers(run)[name]
    kept = reader.path.read_bytes()
    text, rest = reader.document()
    document = json.loads(text)
    try:
        for way in places(document):
            for value in ODD:
                reader.put(json.dumps(replaced(document, way, value)).encode(), rest)
                survives(reader.read)
    finally:
        reader.path.write_bytes(kept)


def fuzz(run: Path, name: str, examples: int) -> None:
    """Read a file with many changes."""
    reader = readers(run)[name]
    kept = reader.path.read_bytes()
    text, rest = reader.document()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize="SPECFORGE_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(text))
    def read(other: bytes) -> None:
        reader.put(other, rest)
        survives(reader.read)

    try:
        read()
    finally:
        reader.path.write_bytes(kept)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_something_changed(run: Path, name: str) -> None:
    fuzz(run, name, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_something_changed_many_times(run: Path, name: str) -> None:
    fuzz(run, name, MANY)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(key=st.sampled_from(OVERRIDE_KEYS) | st.text(max_size=20), value=st.text(max_size=30) | JSON)
def test_any_override(key: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    raw: dict[str, Any] = {"target": {"path": "x"}, "strategy": {"name": "linear"}}

    def read() -> None:
        apply_override(raw, f"{key}={text}")
        validate(raw, "here")

    survives(read)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(alphabet="ab01 \n\t:-[]{}&*!|>'\"%#?,.~<_eE+", max_size=60))
def test_any_text_as_a_value(text: str) -> None:
    survives(lambda: apply_override({}, f"train.seed={text}"))
