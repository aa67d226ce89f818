"""The comparison's command in miniature: one capture, every method, one table."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge_core.load import load_config, read_yaml
from specforge_core.testing import forked
from specforge_core.testing.toy import save_toy_target, write_conversations

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples/recipes/compare"
BLOCKS = {"block_size": 4, "num_layers": 1, "num_anchors": 8}
EAGLE = {"draft_vocab_size": "full", "train_head": False}
OWN: dict[str, dict[str, Any]] = {
    "dflash": BLOCKS,
    "dflash2": {**BLOCKS, "conv_group_size": 8, "selector_rank": 8},
    "domino": {**BLOCKS, "gru_hidden_dim": 16, "emb_dim": 8},
    "dspark": {**BLOCKS, "block_size": 3, "markov_rank": 8},
    "lilicorr": {**BLOCKS, "lattice_layers": 1, "lattice_heads": 2, "lattice_hidden_size": 16},
    "eagle3": {**EAGLE, "steps": 3, "draft_length": 3},
    "peagle": {**EAGLE, "num_layers": 1, "depths": 3},
}
SHORT = (
    "target.dtype=float32",
    "strategy.layers=[1,2,4]",
    "data.max_length=96",
    "train.batch_size=4",
    "train.optimizer=adamw",
    "eval.limit=1",
    "eval.max_new_tokens=6",
    "regenerate.batch_size=8",
    "regenerate.max_new_tokens=12",
    "regenerate.seed=1",  # with which the toy never draws the mask token, 259
)


def miniature(place: Path) -> list[str]:
    """Write a target, prompts and options of a toy's size; return the command's arguments."""
    save_toy_target(place / "target")
    for name, seed in (("prompts", 1), ("samples", 2), ("heldout", 3)):
        write_conversations(place / f"{name}.jsonl", 8, seed=seed)
    own: dict[str, Any] = {name: {"strategy": options} for name, options in OWN.items()}
    own |= {"linear": None, "dflash-short": None}
    (place / "methods.yaml").write_text(yaml.safe_dump(own))
    prompts = f"eval.prompts={{toy: {place / 'heldout.jsonl'}}}"
    paths = {"target": place / "target", "prompts": place, "methods-file": place / "methods.yaml"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return [str(place / "out"), *flags, "--tokens", "600", *SHORT, prompts]


def command(arguments: list[str]) -> str:
    """Run the recipe's command; return what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "SPECFORGE_SGLANG_PYTHON"}
    process = forked.python(RECIPE / "compare.py", *arguments, env=env)
    out, err = process.communicate(timeout=forked.SECONDS)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.slow
def test_one_command_captures_once_and_compares_every_method(tmp_path: Path) -> None:
    for name in OWN:
        pytest.importorskip(f"specforge_{name}", reason=f"specforge-{name} is not installed")
    arguments = miniature(tmp_path)
    printed, out = command(arguments), tmp_path / "out"
    manifest = json.loads((out / "capture/manifest.json").read_text())
    found = json.loads((out / "table.json").read_text())["methods"]
    assert set(found) == set(OWN)
    for row in found.values():
        assert row["tokens"] == found["dflash"]["tokens"] >= 500
        assert row["drafted_tokens"] == 3
        assert row["lossless"] == "1 of 1 greedy answers equal the target's own"
        assert row["t0"].keys() == row["t1"].keys() == {"toy", "all"}
        assert 1 <= row["t0"]["toy"] <= 4
        assert row["train_tokens_per_second"] > 0
        assert row["tokens_per_second"] > 0
        assert row["served"] is None
    assert found["dflash2"]["parameters"] > found["dflash"]["parameters"] > 0
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| method | drafted | parameters | T=0 toy | T=0 all | T=1 toy |")
    first = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:10]]
    assert first == [*found, "no draft"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("...") == 2 + 1 + 3 * len(OWN)  # answers, the capture, and of each method
    # where several ran at once their speeds are measured again, and nothing else is
    again = command([*arguments, "--methods", "dflash", "--jobs", "2"])
    assert again.count("...") == 3
    assert (out / "pace/dflash/metrics.jsonl").exists()
    assert json.loads((out / "capture/manifest.json").read_text()) == manifest


@pytest.mark.parametrize("method", OWN)
def test_every_method_drafts_as_many_tokens_of_the_same_layers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(f"specforge_{method}", reason=f"specforge-{method} is not installed")
    inputs = runpy.run_path(str(RECIPE / "inputs.py"))
    own = read_yaml(RECIPE / "methods.yaml")
    path = tmp_path / "run.yaml"
    inputs["write_config"](path, method, RECIPE / "run.yaml", own, {"target": {"path": "there"}})
    run, _ = load_config(path)
    options: Any = run.strategy
    assert options.layers == (1, 14, 26)
    assert run.train.batch_size * run.train.accumulate == 32
    names = ("num_draft_tokens", "draft_tokens", "draft_length")
    assert next(getattr(options, name) for name in names if hasattr(options, name)) == 7
    monkeypatch.chdir(ROOT)
    sources = [Path(source) for found in run.eval.prompts.values() for source in found]
    assert all(source.is_file() for source in sources)
