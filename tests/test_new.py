"""What `specforge new` writes works: it passes its own tests, trains, evaluates and exports."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from specforge_core.data.regenerate import regenerate
from specforge_core.errors import ConfigError, PluginError
from specforge_core.listing import check
from specforge_core.new import kinds, write_package
from specforge_core.testing.forked import cli, run
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import finish, load, losses, write_run
from specforge_core.train.run import train

# a variant of a method with as many hooks as there are, and of one with the fewest
BLOCKS = "strategy.block_size=4 strategy.num_layers=1 strategy.num_capture_layers=2"
ALL = [
    *(kind for kind in kinds() if kind != "variant"),
    f"variant of dflash {BLOCKS}",
    "variant of linear",
]


@pytest.fixture(params=["method"])
def package(
    fake_site: FakeSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Path:
    """A new package that is installed as an editable one is: metadata, and a path."""
    home = tmp_path / "specforge-two-words"
    kind, _, of = request.param.partition(" of ")
    of, *overrides = of.split() or [None]
    if of is not None:
        pytest.importorskip(f"specforge_{of}")
    write_package("two-words", kind, home, of, tuple(overrides))
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
    for module in [m for m in sys.modules if m.partition(".")[0] == "specforge_two_words"]:
        monkeypatch.delitem(sys.modules, module)  # of another kind
    return home


@pytest.mark.parametrize("package", ALL, indirect=True)
def test_no_word_of_the_template_is_left(package: Path) -> None:
    files = [path for path in package.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"pyproject.toml", "README.md", "ci.yml"}
    assert (package / "tests" / "test_two_words.py") in files
    for path in files:
        assert "example" not in path.read_text().lower(), path
        assert "example" not in str(path.relative_to(package)), path


@pytest.mark.parametrize("package", ALL, indirect=True)
def test_a_new_package_is_clean_for_its_own_linter(package: Path) -> None:
    pytest.importorskip("ruff")
    for arguments in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", ALL, indirect=True)
def test_a_new_package_passes_its_own_tests_as_written(
    package: Path, request: pytest.FixtureRequest
) -> None:
    main = Path(pytest.__file__).with_name("__main__.py")
    done = run("-q", "-p", "no:cacheprovider", str(package), cwd=package, script=main)
    assert done.returncode == 0, done.stdout
    lacks = "variant of linear" in request.node.name  # that method reads no export back
    assert done.stdout.count("skipped") == lacks, done.stdout


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


@pytest.mark.parametrize("package", ["engine"], indirect=True)
def test_a_new_engine_is_checked_and_answers_prompts_as_the_cores_own(
    package: Path, tmp_path: Path, toy_target: Path
) -> None:
    assert "specforge_target_engine" in "".join(check("two_words"))
    strategy = {"name": "linear"}
    config = write_run(tmp_path, toy_target, conversations=3, strategy=strategy)
    asked = (f"regenerate.prompts=[{tmp_path / 'train.jsonl'}]", "regenerate.max_new_tokens=6")
    answers = []
    for engine in ("two_words", "transformers"):
        keep = ("regenerate.keep_unfinished=true", f"target.engine={engine}")
        output = tmp_path / f"{engine}.jsonl"
        regenerate(*load(config, *asked, *keep), output)
        answers.append(output.read_text())
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 3


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


def test_a_variant_is_of_a_method_that_is_there_and_nothing_else_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Try: specforge new mine --kind variant --of METHOD"):
        write_package("mine", "variant", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--kind engine begins no variant .* Take --of linear"):
        write_package("mine", "engine", tmp_path / "out", "linear")
    with pytest.raises(PluginError, match="'liner' is not installed"):
        write_package("mine", "variant", tmp_path / "out", "liner")
    assert not (tmp_path / "out").exists()
