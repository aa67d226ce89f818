"""Where exports may be written, and what else may be named in the place of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from specforge_core.cli import cli
from specforge_core.drafts.checkpoint import CHECKSUMS, check_files, find
from specforge_core.drafts.export import PROVENANCE, read_provenance, write_export
from specforge_core.drafts.links import link, odd_links
from specforge_core.drafts.state import STATE, read_state
from specforge_core.errors import CheckpointError
from specforge_core.types import Export

EXPORT = Export(config={"a": 1}, weights={"w": torch.ones(2)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return an output directory with a checkpoint, of which only the names are looked at."""
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).touch()
    return tmp_path / "run"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        "checkpoints/step-00000005",  # removed as a checkpoint that was not finished
        "checkpoints/step-00000003/draft",  # goes with the checkpoint
        "best",  # then OUTPUT_DIR@best is none
        "latest",
    ],
)
def test_no_export_is_written_among_the_checkpoints_of_a_run(
    run: Path, place: str, force: bool
) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=r"belongs to the run in .*such as .*run/export"):
        write_export(EXPORT, run / place, {}, force=force)
    assert sorted(run.rglob("*")) == before
    write_export(EXPORT, run / "export", {}, force=force)


def own_folder(export: Path, name: str) -> None:
    (export / name).mkdir()
    (export / name / "notes.txt").write_text("mine")


@pytest.mark.parametrize("name", ["keep", "model-mine.safetensors"])
def test_no_folder_in_an_export_is_replaced(tmp_path: Path, name: str) -> None:
    """Whatever it is called, and though provenance.json names it as a file of the export."""
    out = tmp_path / "out"
    write_export(EXPORT, out, {})
    own_folder(out, name)
    told = json.loads((out / PROVENANCE).read_text())
    (out / PROVENANCE).write_text(json.dumps({**told, "files": [name]}))
    with pytest.raises(CheckpointError, match=rf"not an export \({name}\)"):
        write_export(EXPORT, out, {}, force=True)
    assert (out / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("leads", ["out", "nowhere"])
def test_a_link_that_leads_to_no_folder_is_no_place(tmp_path: Path, leads: str) -> None:
    (tmp_path / "out").symlink_to(leads)
    if leads == "nowhere":  # the folder is made where it leads
        write_export(EXPORT, tmp_path / "out", {})
        assert (tmp_path / "nowhere" / PROVENANCE).is_file()
        return
    with pytest.raises(CheckpointError, match="out is no folder"):
        write_export(EXPORT, tmp_path / "out", {})


@pytest.mark.parametrize("plant", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_damage_and_not_the_file_of_an_older_version(
    run: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    """Where these files are missing, nothing is compared."""
    checkpoint = run / "checkpoints/step-00000003"
    assert not check_files(checkpoint)
    plant(checkpoint / CHECKSUMS)
    with pytest.raises(CheckpointError, match=rf"{CHECKSUMS} is damaged"):
        check_files(checkpoint)
    assert read_provenance(tmp_path) == {}
    plant(tmp_path / PROVENANCE)
    with pytest.raises(CheckpointError, match=f"{PROVENANCE} cannot be read"):
        read_provenance(tmp_path)


def test_best_is_a_checkpoint_of_the_run(run: Path, tmp_path: Path) -> None:
    """A run may be anybody's, so a link in it does not decide which draft is read."""
    best = Path(f"{run}@best")
    checkpoint = run / "checkpoints/step-00000003"
    for leads in ("checkpoints/step-00000003", checkpoint):
        (run / "best").symlink_to(leads)
        assert find(best).resolve() == checkpoint
        (run / "best").unlink()
    checkpoint.rename(tmp_path / "step-00000003")
    for leads in ("../step-00000003", tmp_path / "step-00000003", "..", "/"):
        (run / "best").symlink_to(leads)
        with pytest.raises(
            CheckpointError, match=r"the link leads to .*, no checkpoint of this run"
        ):
            find(best)
        (run / "best").unlink()


def own_file(run: Path, name: str) -> None:
    (run / name).write_text("mine")


def own_link(run: Path, name: str) -> None:
    (run / name).symlink_to("metrics.jsonl")


def copied(run: Path, name: str) -> None:
    shutil.copytree(run / "checkpoints/step-00000003", run / name)


def dangling(run: Path, name: str) -> None:
    (run / name).symlink_to("checkpoints/step-00000009")


@pytest.mark.parametrize("name", ["best", "latest"])
@pytest.mark.parametrize(
    ("plant", "line", "message"),
    [
        (own_file, "no link to a checkpoint", "it is no link to a .* somebody's own. Try: {run}$"),
        (own_link, "no link to a checkpoint", "the link leads to {run}/metrics.jsonl"),
        (copied, "no link to a checkpoint", "is a folder, as in a copy, .* Try: {run}/{name}$"),
        (dangling, "leads to checkpoints/step-00000009", "step-00000009, .* there. Try: {run}$"),
    ],
)
def test_what_has_the_name_of_a_link_and_is_none_is_told_and_stays(
    run: Path, name: str, plant: Callable[[Path, str], None], line: str, message: str
) -> None:
    (run / "metrics.jsonl").touch()
    assert odd_links(run) == []
    plant(run, name)
    with pytest.raises(CheckpointError, match=message.format(run=run, name=name)):
        find(Path(f"{run}@{name}"))
    told = odd_links(run)
    link(run, name, run / "checkpoints/step-00000003")
    if plant is dangling:  # one of the run's own: the next checkpoint is its
        assert len(told) == (name == "best")
        assert odd_links(run) == []
    else:
        assert len(told) == 1
        assert f"{run}@{name} names none" in told[0]
        assert odd_links(run) == told
    assert all(line in found for found in told)


def test_beside_a_damaged_checkpoint_that_a_link_names_the_earlier_one_is_seen(run: Path) -> None:
    earlier, last = (run / f"checkpoints/step-0000000{step}" for step in (3, 4))
    shutil.copytree(earlier, last)
    link(run, "latest", last)
    with pytest.raises(CheckpointError, match=f"or use {earlier}.*: rm -r {last}$"):
        read_state(run / "latest")


@pytest.mark.parametrize(
    ("path", "message"),
    [("x" * 256, "255 bytes for a name"), ("x/" * 2048 + "x", "4095 in all"), ("a\0b", "no NUL")],
)
def test_a_path_that_no_file_system_takes_is_told_of(path: str, message: str) -> None:
    options = ("--checkpoint", path), ("-o", path), ("-c", path)
    for name, value in options:
        others = [part for pair in options if pair[0] != name for part in (pair[0], "there")]
        done = CliRunner().invoke(cli, ["export", name, value, *others], standalone_mode=False)
        assert isinstance(done.exception, click.BadParameter)
        assert message in str(done.exception)
