"""What is printed of an export can be typed."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import torch

from specforge_core.drafts.export import write_export
from specforge_core.drafts.served import after_export
from specforge_core.types import Export, ExportFile

SGLANG = {"speculative_sts_path": ExportFile(name="sts.json"), "--x-y": 2, "on": True, "no": False}
EXPORT = Export(
    config={"a": 1},
    weights={"w": torch.ones(2)},
    files={"sts.json": b"{}"},
    serve={
        "sglang": SGLANG,
        "vllm": {"method": "mine", "num_speculative_tokens": 3},
        "another": {"steps": 2},
        "none": {},
    },
    environment={"sglang": {"MODE": "two words"}, "vllm": {"RUNNER": "0"}, "none": {"A": "1"}},
)


def lines(tmp_path: Path, format: str) -> list[str]:
    write_export(EXPORT, tmp_path / "my draft", {"target": "org/model"}, force=True)
    first, *served, last = after_export(tmp_path / "my draft", format).splitlines()
    assert first == f"wrote {tmp_path}/my draft"
    assert last == f"Try: specforge eval -c RUN.yaml --draft '{tmp_path}/my draft'"
    return served


def test_the_command_of_the_format_is_printed(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, "sglang")
    said, words = line.split(": ", 1)[0], typed(line)
    assert said == "sglang serves it with"
    assert words[:4] == ["two words", "python", "-m", "sglang.launch_server"]
    assert words[4:8] == ["--model-path", "org/model", "--speculative-draft-model-path",
                          f"{tmp_path}/my draft"]  # fmt: skip
    sts = f"{tmp_path.resolve()}/my draft/sts.json"
    assert words[8:] == ["--speculative-sts-path", sts, "--x-y", "2", "--on"]


def test_commands_of_all_engines_are_printed_of_a_format_that_is_none(tmp_path: Path) -> None:
    another, sglang, vllm = lines(tmp_path, "hf")
    assert another == "another serves it with: steps=2"
    assert sglang.startswith("sglang serves it with: MODE='two words' python -m ")
    assert vllm.startswith("vllm serves it with: RUNNER=0 vllm serve org/model ")
    config = {"model": f"{tmp_path}/my draft", "method": "mine", "num_speculative_tokens": 3}
    assert json.loads(shlex.split(vllm)[-1]) == config


def typed(line: str) -> list[str]:
    """The words that a shell sees, the variable MODE before them."""
    command = line.split(": ", 1)[1]
    show = 'python() { printf "%s\\0" "$MODE" python "$@"; }; '
    found = subprocess.run(["bash", "-c", show + command], capture_output=True, check=True)
    return found.stdout.decode().split("\0")[:-1]
