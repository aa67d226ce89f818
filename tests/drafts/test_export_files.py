"""What an export says beside its config and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge_core.drafts.export import INDEX, check_place, read_serve, write_export
from specforge_core.drafts.verify import verify_draft
from specforge_core.errors import CheckpointError, PluginError
from specforge_core.types import Export, ExportFile

EXPORT = Export(
    config={"a": 1},
    weights={"w": torch.ones(2)},
    files={"chat_template.jinja": b"{{ x }}"},
    serve={"engine": {"flag": 3}},
    causes={"a": "drafts would be longer"},
    base="org/model",
)


def test_serve_causes_base_and_files_are_written(tmp_path: Path) -> None:
    write_export(EXPORT, tmp_path / "out", {"strategy": "mine"})
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == b"{{ x }}"
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["serve"] == {"engine": {"flag": 3}}
    assert told["causes"] == {"a": "drafts would be longer"}
    assert (told["base"], told["files"]) == ("org/model", ["chat_template.jinja"])
    assert read_serve(tmp_path / "out", "engine") == {"flag": 3}
    assert read_serve(tmp_path / "out", "other") is None


def test_serve_names_a_file_of_the_export_wherever_it_lies(tmp_path: Path) -> None:
    flags = {"template": ExportFile(name="chat_template.jinja"), "steps": 2}
    write_export(replace(EXPORT, serve={"engine": flags}), tmp_path / "out", {})
    for place in ("out", "elsewhere"):
        here = (tmp_path / "out").rename(tmp_path / place)
        found = read_serve(here, "engine")
        assert found == {"template": str(here / "chat_template.jinja"), "steps": 2}
        assert Path(found["template"]).read_bytes() == b"{{ x }}"


def test_a_file_that_serve_names_and_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    flags = {"template": ExportFile(name="chat_templat.jinja")}
    with pytest.raises(PluginError, match=r"no file 'chat_templat.jinja', .* names as template"):
        write_export(replace(EXPORT, serve={"engine": flags}), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
    flags = {"template": ExportFile(name="chat_template.jinja")}
    write_export(replace(EXPORT, serve={"engine": flags}), tmp_path / "out", {})
    (tmp_path / "out" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'chat_template.jinja' to serve with"):
        read_serve(tmp_path / "out", "engine")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", 7, None])
def test_a_foreign_provenance_names_no_file_outside_of_its_export(
    tmp_path: Path, name: object
) -> None:
    (tmp_path / "secret").touch()
    write_export(EXPORT, tmp_path / "out", {})
    told = {"serve": {"engine": {"template": {"file_of_export": name}}}}
    (tmp_path / "out" / "provenance.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"to serve with. Export again"):
        read_serve(tmp_path / "out", "engine")


def test_an_export_with_files_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_export(EXPORT, out, {})
    write_export(replace(EXPORT, files={}), out, {}, force=True)
    assert not (out / "chat_template.jinja").exists()
    (out / "chat_template.jinja").touch()  # somebody's own now
    with pytest.raises(CheckpointError, match="not an export"):
        check_place(out, force=True)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "/etc/x", ".hidden", "", "config.json", "provenance.json", "model.safetensors"],
)
def test_files_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="a plain name"):
        write_export(replace(EXPORT, files={name: b""}), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def serve(told: dict[str, object]) -> None:
    told["serve"] = {"engine": {"flag": 4}}


def fingerprint(told: dict[str, object]) -> None:
    told["capture"] = {"target_fingerprint": "another"}


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda out: edit(out / "provenance.json", serve), "provenance.json"),
        (lambda out: edit(out / "provenance.json", fingerprint), "provenance.json"),
        (lambda out: (out / "chat_template.jinja").write_text("{{ y }}"), "chat_template.jinja"),
        (lambda out: (out / "chat_template.jinja").unlink(), "chat_template.jinja"),
        (lambda out: (out / INDEX).write_text((out / INDEX).read_text() + " "), INDEX),
    ],
)
def test_verify_finds_what_was_changed_in_any_file_of_an_export(
    tmp_path: Path, damage: Callable[[Path], object], name: str
) -> None:
    out = tmp_path / "out"
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    config = {"id2label": dict.fromkeys(range(11), "x")}  # its keys are texts when it is read
    write_export(replace(EXPORT, weights=weights, config=config), out, {}, shard_bytes=8)
    assert str(verify_draft(out)).endswith("as they were written")
    damage(out)
    with pytest.raises(
        CheckpointError, match=rf"{name} (is damaged|cannot be read): .*xport again"
    ):
        verify_draft(out)
    check_place(out, force=True)  # which is then possible
