"""A target that cannot be captured is refused with one message, whatever command meets it first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from specforge_core.cli import cli
from specforge_core.errors import SpecForgeError
from specforge_core.testing.runs import write_run

from .packed import awq, gptq

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


def shards(target: Path) -> list[Path]:
    """Save the weights again in two files and an index."""
    stored = load_file(target / WEIGHTS)
    (target / WEIGHTS).unlink()
    names = sorted(stored)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    files = sorted(set(where.values()))
    for file in files:
        part = {name: stored[name] for name in names if where[name] == file}
        save_file(part, target / file, {"format": "pt"})
    (target / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    return [target / file for file in files]


def index_is_a_pointer(target: Path) -> None:
    shards(target)
    (target / f"{WEIGHTS}.index.json").write_text(POINTER)


def half_a_shard(target: Path) -> None:
    (_, second) = shards(target)
    second.write_bytes(second.read_bytes()[:-99])


def still_downloading(target: Path) -> None:
    (_, second) = shards(target)
    second.rename(f"{second}.incomplete")


def pickled(target: Path) -> None:
    torch.save(load_file(target / WEIGHTS), target / "pytorch_model.bin")
    (target / WEIGHTS).unlink()


def not_a_number(target: Path) -> None:
    stored = load_file(target / WEIGHTS)
    stored["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(stored, target / WEIGHTS, {"format": "pt"})


def one_layer_more(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))


def no_tokenizer(target: Path) -> None:
    (target / "tokenizer.json").write_text(POINTER)


FAST = [
    (awq, r"quantised \(awq\), and cannot be run here: .* Try: pip install gptqmodel accelerate,"),
    (index_is_a_pointer, f"{WEIGHTS}.index.json is a pointer of git-lfs"),
    (still_downloading, "lacks model-00002-of-00002.safetensors, which its model"),
    (pickled, f"has no {WEIGHTS} here, and weights of other formats are not read"),
]
SLOW = [
    (gptq, r"quantised \(gptq\), .* Try: pip install gptqmodel optimum accelerate, or target"),
    (lambda t: (t / WEIGHTS).write_text(POINTER), f"{WEIGHTS} is a pointer of git-lfs"),
    (no_tokenizer, "tokenizer.json is a pointer of git-lfs"),
    (lambda t: shards(t)[0].write_text(POINTER), "00001-of-00002.* is a pointer of git-lfs"),
    (lambda t: shards(t)[0].unlink(), "lacks model-00001-of-00002.safetensors, which its"),
    (half_a_shard, "00002-of-00002.safetensors is damaged, or its download did not end"),
    (lambda t: (t / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is damaged, or its download"),
    (lambda t: (t / WEIGHTS).unlink(), f"has no {WEIGHTS} here, and weights of other formats"),
    (not_a_number, "layer 2 of LlamaForCausalLM puts out values that are not finite"),
    (one_layer_more, "lacks 9 of its weights, such as model.layers.6.input_layernorm.weight"),
]


@pytest.mark.parametrize(
    ("damage", "message"), [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_every_command_refuses_it_alike(
    damage: Damage, message: str, toy_target: Path, tmp_path: Path
) -> None:
    if damage in (awq, gptq) and find_spec("gptqmodel"):
        pytest.skip("its package is installed")
    target = shutil.copytree(toy_target, tmp_path / "target")
    damage(target)
    config = write_run(
        tmp_path,
        target,
        conversations=4,
        strategy={"name": "linear"},
        train={"batch_size": 2, "max_steps": 1},
    )
    run = ("-c", str(config))
    captured = f"data.capture_dir={tmp_path / 'capture'}"
    said = {
        _said("check", "linear", f"target.path={target}", "target.dtype=float32"),
        _said("train", *run, "--plan"),
        _said("train", *run, "--plan", captured),
        _said("capture", *run, captured),
        _said("capture", *run, "--estimate", captured),
        _said("train", *run),
    }
    assert len(said) == 1, said
    assert re.search(message, said.pop())
    assert not list(tmp_path.glob("run/**/*.safetensors"))
    assert not list(tmp_path.glob("capture/*.json"))


def _said(*arguments: str) -> str:
    done: Any = CliRunner().invoke(cli, list(arguments), standalone_mode=False)
    assert isinstance(done.exception, SpecForgeError), done.output
    return str(done.exception)
