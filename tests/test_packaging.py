"""The wheels, and a third party's variant installed from them into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from specforge_core.plugins import PLUGINS, discover
from specforge_core.testing.runs import load, losses
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {
    "specforge_core": ROOT,
    "specforge_dflash": ROOT / "plugins/specforge-dflash",
    "specforge_eagle3": ROOT / "plugins/specforge-eagle3",
    "specforge_sglang": ROOT / "plugins/specforge-sglang",
    "specforge_openai": ROOT / "plugins/specforge-openai",
    "specforge_doctor": ROOT / "plugins/specforge-doctor",
    "specforge_trackers": ROOT / "plugins/specforge-trackers",
    "specforge_dflash_short": ROOT / "examples/third_party/specforge-dflash-short",
    "specforge_linear": ROOT / "examples/third_party/specforge-linear",
}
INSTALLED = ("specforge_core", "specforge_dflash", "specforge_dflash_short", "specforge_linear")


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    for source in DISTRIBUTIONS.values():
        build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out))
        run(*build, str(source))
    return {path.name.partition("-")[0]: path for path in out.glob("*.whl")}


@pytest.mark.slow
def test_every_distribution_builds_and_plugins_ask_for_the_core(wheels: dict[str, Path]) -> None:
    assert set(wheels) == set(DISTRIBUTIONS)
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (n for n in archive.namelist() if n.endswith("dist-info/METADATA"))
            text = archive.read(metadata).decode()
            assert not any("tests" in Path(n).parts for n in archive.namelist())
        assert (name == "specforge_core") != ("Requires-Dist: specforge-core" in text)


@pytest.fixture(scope="module")
def home(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds some of the wheels, and of the checkout nothing."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # torch and the like come from here; .pth files of this environment, which make the
    # checkout importable, are not followed from there
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", *(str(wheels[name]) for name in INSTALLED))
    return home


@pytest.mark.slow
def test_a_variant_trains_on_its_parents_capture_and_goes_on_from_its_run(
    home: Path, tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its metadata is seen through libraries.pth, its module is not
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", ",".join(discover(PLUGINS)))
    ask = "import specforge_core; print(specforge_core.__file__)"
    assert run(str(home / "bin" / "python"), "-c", ask, cwd=tmp_path).startswith(str(home))
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
    specforge = str(home / "bin" / "specforge")

    def call(command: str, *options: str, of: Path = config) -> str:
        return run(specforge, command, "-c", str(of), *options, cwd=tmp_path)

    listed = run(specforge, "strategies", cwd=tmp_path)
    assert "dflash-short" in listed
    assert "linear           specforge-linear 0.2.0" in listed
    call("capture")
    assert "finished at step 3/3" in call("train")

    short = ("strategy.name=dflash-short", "strategy.trained_slots=2")
    start = f"train.init_from={tmp_path / 'parent'}"
    other = ("train.max_steps=2", f"output_dir={tmp_path / 'short'}", start)
    assert "finished at step 2/2" in call("train", *short, *other)
    draft = ("--draft", str(tmp_path / "short"))
    assert "1 of 1 greedy answers equal the target's own" in call("eval", *draft, *short)

    # a method by itself; its capture is made while it trains
    alone = {key: raw[key] for key in ("target", "train", "eval")}
    alone |= {"strategy": {"name": "linear"}, "data": {"train": [str(data)]}}
    linear = tmp_path / "linear.yaml"
    linear.write_text(yaml.safe_dump({**alone, "output_dir": str(tmp_path / "linear")}))
    assert "finished at step 3/3" in call("train", of=linear)
    assert "at step 3/2: " in (again := call("train", "train.max_steps=2", of=linear))
    assert "It was beyond that before, so nothing was trained" in again
    draft = ("--draft", str(tmp_path / "linear"))
    assert "1 of 1 greedy answers equal the target's own" in call("eval", *draft, of=linear)

    # here, where the same packages are: the same weights and samples, but other slots have a loss
    train(*load(config, "train.max_steps=2", f"output_dir={tmp_path / 'all'}", start))
    short_loss, whole_loss = losses(tmp_path / "short")[0], losses(tmp_path / "all")[0]
    assert short_loss != whole_loss
    # a block of 6 drafts 5 tokens: with all of them trained it is DFlash again
    same = ("strategy.name=dflash-short", "strategy.trained_slots=5", "train.max_steps=2")
    train(*load(config, *same, f"output_dir={tmp_path / 'same'}", start))
    assert losses(tmp_path / "same")[0] == whole_loss
