"""What `specforge new` writes works: it passes its own tests, trains, evaluates and exports."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from specforge_core.errors import ConfigError
from specforge_core.listing import check
from specforge_core.new import kinds, write_package
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import cli, finish, load, losses, write_run
from specforge_core.train.run import train


@pytest.fixture(params=["method"])
def package(
    fake_site: FakeSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Path:
    """A new package that is installed as an editable one is: metadata, and a path."""
    home = tmp_path / "specforge-two-words"
    write_package("two-words", request.param, home)
    project = tomllib.loads((home / "pyproject.toml").read_text())["project"]
    fake_site.dist(
        project["name"],
        project["version"],
        project["entry-points"],
        requires=project["dependencies"],
    )
    path = os.pathsep.join((str(fake_site.path), str(home)))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(str(home))
    return home


@pytest.mark.parametrize("package", kinds(), indirect=True)
def test_no_word_of_the_template_is_left(package: Path) -> None:
    files = [path for path in package.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"pyproject.toml", "README.md", "ci.yml"}
    assert (package / "tests" / "test_two_words.py") in files
    for path in files:
        assert "example" not in path.read_text().lower(), path
        assert "example" not in str(path.relative_to(package)), path


@pytest.mark.slow
@pytest.mark.parametrize("package", kinds(), indirect=True)
def test_a_new_package_passes_its_own_tests_as_written(package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_a_new_method_trains_evaluates_and_exports(
    package: Path, tmp_path: Path, toy_target: Path
) -> None:
    strategy = {"name": "two_words"}
    settings = {"max_steps": 3}
    config = write_run(tmp_path, toy_target, conversations=8, strategy=strategy, train=settings)
    out, export = str(tmp_path / "run"), str(tmp_path / "export")
    finish(cli("train", "-c", str(config)))
    held = (f"eval.prompts.held={tmp_path / 'train.jsonl'}", "eval.limit=2")
    assert "2 of 2 greedy answers equal" in finish(
        cli("eval", "-c", str(config), "--draft", out, *held, "eval.max_new_tokens=8")
    )
    finish(cli("export", "--checkpoint", out, "-o", export))
    finish(cli("eval", "-c", str(config), "--draft", export, *held, "eval.max_new_tokens=8"))


@pytest.mark.parametrize("package", ["tracker"], indirect=True)
def test_a_new_tracker_is_checked_and_tracks_a_run(
    package: Path, tmp_path: Path, toy_target: Path
) -> None:
    assert "plugins.two_words" in "".join(check("two_words"))
    settings = {"max_steps": 2}
    strategy = {"name": "linear"}
    config = write_run(tmp_path, toy_target, conversations=8, strategy=strategy, train=settings)
    train(*load(config, "plugins.two_words={}"))
    text = (tmp_path / "run" / "two_words.csv").read_text()
    assert [float(v) for _, n, v in csv.reader(text.splitlines()) if n == "loss"] == losses(
        tmp_path / "run"
    )


@pytest.mark.parametrize("name", ["Big", "two words", "a_b", "1st", "-x", ""])
def test_a_name_that_no_package_may_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name of a package"):
        write_package(name, "method", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_directory_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        write_package("mine", "method", tmp_path)
    with pytest.raises(ConfigError, match=f"Try: --kind {', '.join(kinds())}"):
        write_package("mine", "metod", tmp_path / "out")
