"""A variant of a method, installed from wheels into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from specforge_core.plugins import PLUGINS, discover
from specforge_core.testing.runs import losses
from specforge_core.testing.toy import write_conversations

ROOT = Path(__file__).parent.parent
SOURCES = (
    ROOT,
    ROOT / "plugins/specforge-dflash",
    ROOT / "examples/third_party/specforge-dflash-short",
)


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def specforge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command of an environment that holds the three wheels."""
    work = tmp_path_factory.mktemp("installed")
    for source in SOURCES:
        build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir")
        run(*build, str(work / "wheels"), str(source))
    venv.create(work / "venv")
    python = work / "venv/bin/python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # torch and the like come from here; .pth files, which make the checkout importable, do not
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", *map(str, sorted((work / "wheels").glob("*.whl"))))
    return str(work / "venv/bin/specforge")


@pytest.mark.slow
def test_a_variant_trains_on_its_parents_capture_and_goes_on_from_its_run(
    specforge: str, tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its metadata is seen through libraries.pth, its module is not
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", ",".join(discover(PLUGINS)))
    data = write_conversations(tmp_path / "train.jsonl", 8)
    raw = {
        "target": {"path": str(toy_target), "dtype": "float32", "device": "cpu"},
        "strategy": {"name": "dflash", "block_size": 6, "num_layers": 1, "layers": [1, 3]},
        "data": {"train": [str(data)], "capture_dir": str(tmp_path / "capture")},
        "output_dir": str(tmp_path / "parent"),
        "train": {"max_steps": 3, "batch_size": 2, "device": "cpu", "log_every": 1},
        "eval": {"prompts": {"toy": str(data)}, "limit": 1, "max_new_tokens": 8},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))

    def call(command: str, *options: str) -> str:
        return run(specforge, command, "-c", str(config), *options, cwd=tmp_path)

    assert "dflash-short" in run(specforge, "strategies", cwd=tmp_path)
    call("capture")
    assert "finished at step 3/3" in call("train")

    short = ("strategy.name=dflash-short", "strategy.trained_slots=2")
    other = ("train.max_steps=2", f"output_dir={tmp_path / 'short'}")
    start = f"train.init_from={tmp_path / 'parent'}"
    assert "finished at step 2/2" in call("train", *short, *other, start)
    # the same weights and samples, but other slots have a loss
    all_slots = ("train.max_steps=2", f"output_dir={tmp_path / 'all'}", start)
    call("train", *all_slots)
    short_loss, whole_loss = losses(tmp_path / "short")[0], losses(tmp_path / "all")[0]
    assert short_loss != whole_loss
    # a block of 6 drafts 5 tokens: with all of them trained it is DFlash again
    same = ("strategy.name=dflash-short", "strategy.trained_slots=5", "train.max_steps=2")
    call("train", *same, f"output_dir={tmp_path / 'same'}", start)
    assert losses(tmp_path / "same")[0] == whole_loss
    draft = ("--draft", str(tmp_path / "short"))
    assert "1 of 1 greedy answers equal the target's own" in call("eval", *draft, *short)
