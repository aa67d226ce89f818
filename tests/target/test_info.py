from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import TargetConfig
from specforge_core.target import info
from specforge_core.target.info import load_target_info


def test_a_config_is_read_once_for_as_long_as_its_text_stays(
    toy_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = info._read

    def counted(target: TargetConfig) -> Any:
        reads.append(target.path)
        return read(target)

    monkeypatch.setattr(info, "_read", counted)
    shutil.copytree(toy_target, tmp_path / "target")
    target = TargetConfig(path=str(tmp_path / "target"))
    first = load_target_info(target)
    config: Any = first.config
    config["rms_norm_eps"] = 3.0  # each caller's own
    again = load_target_info(target.model_copy(update={"batch_tokens": 7}))
    assert len(reads) == 1
    assert again.config["rms_norm_eps"] == 1e-6
    file = tmp_path / "target" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    assert load_target_info(target).config["rms_norm_eps"] == 0.5
    load_target_info(target.model_copy(update={"trust_remote_code": True}))
    load_target_info(target.model_copy(update={"trust_remote_code": True}))
    assert len(reads) == 4
