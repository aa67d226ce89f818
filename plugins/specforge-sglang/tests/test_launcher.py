"""The launcher adds what a capture needs and refuses what contradicts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import specforge_sglang_capture
from specforge_sglang_capture import parse_version
from specforge_sglang_capture.__main__ import add_required, made_for_server


def test_flags_are_added_once() -> None:
    made = add_required(["--model-path", "m", "--disable-radix-cache"])
    assert made.count("--disable-radix-cache") == 1
    assert made[made.index("--chunked-prefill-size") + 1] == "-1"
    assert {"--disable-cuda-graph", "--skip-server-warmup"} <= set(made)


def test_a_contradiction_is_an_error() -> None:
    with pytest.raises(SystemExit, match="a capture needs --chunked-prefill-size -1"):
        add_required(["--chunked-prefill-size", "4096"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.5.14", (0, 5, 14)),
        ("0.5.15.post1", (0, 5, 15)),
        ("0.5.9rc1", (0, 5, 91)),
        ("1.0", (1, 0)),
    ],
)
def test_versions_compare_by_number(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


def test_the_plugin_is_inert_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(specforge_sglang_capture.ENABLE_ENV, raising=False)
    specforge_sglang_capture.register()  # SGLang is not installed here: an import would fail
    monkeypatch.setenv(specforge_sglang_capture.ENABLE_ENV, "1")
    with pytest.raises(ModuleNotFoundError, match="sglang"):
        specforge_sglang_capture.register()


def test_only_a_directory_made_for_a_server_is_deleted_with_it(tmp_path: Path) -> None:
    """A folder of a like name is not one."""
    mine = tmp_path / "specforge-sglang-fork"
    mine.mkdir()
    assert not made_for_server(mine)
    (mine / ".specforge-server").write_text("notes")
    assert not made_for_server(mine)
    (mine / ".specforge-server").write_text(specforge_sglang_capture.MADE_BY)
    assert made_for_server(mine)
