"""Variables that an export asks for, which may be anybody's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.options import read_options
from specforge_sglang.serve import tell_unset

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import write_export
from specforge_core.load import apply_override
from specforge_core.types import Export


def test_variables_that_an_export_asks_for_are_told_and_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"sglang": {"MODE": "7", "SET": "1"}, "vllm": {"OTHER": "1"}}
    export = Export(config={"a": 1}, weights={"w": torch.ones(2)}, environment=asked)
    write_export(export, tmp_path / "export", {})
    tell_unset(tmp_path / "export", {"SET": "1"})
    said = capsys.readouterr().err
    assert "SGLang runs without MODE=7, which" in said
    (option,) = (word for word in said.split() if word.startswith("target.options.env."))
    options = {"python": sys.executable, "env": {"SET": "1"}}
    raw: dict[str, Any] = {"target": {"path": "target", "engine": "sglang", "options": options}}
    apply_override(raw, option)
    typed = read_options(TargetConfig.model_validate(raw["target"]))
    tell_unset(tmp_path / "export", typed.env)
    assert capsys.readouterr().err == ""
