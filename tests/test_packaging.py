"""The wheels, and a third party's package installed from one into an environment of its own."""

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
from specforge_core.testing.toy import write_conversations

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


@pytest.mark.slow
def test_a_third_party_installs_wheels_and_trains(
    wheels: dict[str, Path],
    tmp_path: Path,
    toy_target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # its metadata is seen through libraries.pth, its module is not
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", ",".join(discover(PLUGINS)))
    home = tmp_path / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # torch and the like come from here; .pth files of this environment, which make the
    # checkout importable, are not followed from there
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    chosen = [str(wheels["specforge_core"]), str(wheels["specforge_linear"])]
    run(*pip, "--no-deps", "--no-index", *chosen)
    ask = "import specforge_core; print(specforge_core.__file__)"
    where = run(str(python), "-c", ask, cwd=tmp_path)
    assert where.startswith(str(home))

    data = write_conversations(tmp_path / "train.jsonl", 8)
    raw = {
        "target": {"path": str(toy_target)},
        "strategy": {"name": "linear"},
        "data": {"train": [str(data)]},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 4, "device": "cpu"},
        "eval": {"prompts": {"toy": str(data)}, "limit": 1, "max_new_tokens": 8},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    specforge = str(home / "bin" / "specforge")
    assert "linear           specforge-linear 0.2.0" in run(specforge, "strategies", cwd=tmp_path)
    assert "finished at step 4/4" in run(specforge, "train", "-c", str(config), cwd=tmp_path)
    draft = ("--draft", str(tmp_path / "run"))
    out = run(specforge, "eval", "-c", str(config), *draft, cwd=tmp_path)
    assert "1 of 1 greedy answers equal the target's own" in out
