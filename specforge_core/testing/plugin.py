"""Pytest fixtures for strategy packages; active wherever specforge-core is installed.

`fake_site` is a throw-away site-packages: write distributions, then discover
them through real entry-point metadata.  `toy_target` is a tiny Llama with a
real tokenizer and chat template, saved as a Hugging Face directory.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

pytest.register_assert_rewrite("specforge_core.testing.contract")


class FakeSite:
    """A directory on sys.path that holds distributions written by a test."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(path))

    def dist(
        self,
        name: str,
        version: str,
        entry_points: Mapping[str, Mapping[str, str]],
        *,
        module: str | None = None,
        source: str = "",
        requires: Iterable[str] = (),
        summary: str = "",
    ) -> None:
        """Write a distribution's metadata, and one module of `source` if named."""
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Summary: {summary}"] if summary else []
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        groups = [
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
            for group, entries in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("".join(groups))
        if module is not None:
            (self.path / f"{module}.py").write_text(textwrap.dedent(source))
            self.monkeypatch.delitem(sys.modules, module, raising=False)

    def strategy(
        self, name: str, source: str, *, version: str = "0.1.0", requires: Iterable[str] = ()
    ) -> None:
        """Write a package that registers the strategy `name`."""
        module = f"specforge_{name}"
        group = {"specforge.strategies": {name: module}}
        self.dist(
            f"specforge-{name}", version, group, module=module, source=source, requires=requires
        )


@pytest.fixture
def fake_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSite:
    """Return an empty site-packages that Python imports and discovers from."""
    path = tmp_path / "site-packages"
    path.mkdir()
    return FakeSite(path, monkeypatch)


@pytest.fixture(scope="session")
def toy_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny random Llama with tokenizer and chat template."""
    from .toy import save_toy_target

    path = tmp_path_factory.mktemp("toy-target")
    save_toy_target(path)
    return path
