"""Tests that need SGLang are skipped where it cannot be installed, except where CI says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing can be installed."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delenv("SPECFORGE_SGLANG_PYTHON", raising=False)
    monkeypatch.delenv("SPECFORGE_REQUIRE_SGLANG", raising=False)
    return tmp_path


@pytest.mark.parametrize("required", [True, False])
def test_an_install_that_fails(
    find_sglang: object, broken: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    assert callable(find_sglang)
    if required:
        monkeypatch.setenv("SPECFORGE_REQUIRE_SGLANG", "1")
    outcome = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(outcome, match=r"SGLang 9\.9 cannot be installed here: no network"):
        find_sglang("9.9", broken)


def test_a_named_interpreter_is_taken_as_it_is(
    find_sglang: object, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(find_sglang)
    monkeypatch.setenv("SPECFORGE_SGLANG_PYTHON", "/opt/sglang/python")
    assert find_sglang("9.9", broken) == "/opt/sglang/python"
