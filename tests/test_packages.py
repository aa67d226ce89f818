from __future__ import annotations

from importlib import metadata
from importlib.metadata import PackageNotFoundError

import pytest

from specforge_core import packages
from specforge_core.plugins import discover
from specforge_core.testing.plugin import FakeSite


def test_what_is_installed_meanwhile_is_found(env: FakeSite) -> None:
    with pytest.raises(PackageNotFoundError):
        packages.version("specforge-new")
    assert packages.declared("some.group") == []
    env.dist("specforge-new", "1.5", {"some.group": {"new": "specforge_new"}})
    assert packages.version("specforge-new") == "1.5"
    assert [ep.name for ep in packages.declared("some.group")] == ["new"]
    assert discover("some.group")["new"].version == "1.5"


def test_metadata_is_read_once(env: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    env.dist("specforge-new", "1.5", {"some.group": {"new": "specforge_new"}})
    first = packages.version("specforge-new"), discover("some.group")
    monkeypatch.delattr(metadata, "version")
    monkeypatch.delattr(metadata, "entry_points")
    assert (packages.version("specforge-new"), discover("some.group")) == first
    first[1].clear()  # whoever asked may change what it got
    assert discover("some.group")
