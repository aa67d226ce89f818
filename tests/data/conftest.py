"""Fixtures that the tests of this folder share."""

from __future__ import annotations

import pytest

from specforge_core.testing.plugin import FakeSite

from .scripted import ENGINE


@pytest.fixture
def scripted(fake_site: FakeSite) -> None:
    """Install the target engine that writes what a script says."""
    group = {"specforge.plugins": {"scripted": "scripted_engine"}}
    fake_site.dist("scripted-engine", "0.1.0", group, module="scripted_engine", source=ENGINE)
