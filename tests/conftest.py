from __future__ import annotations

import pytest

from specforge_core.testing.plugin import FakeSite


@pytest.fixture
def env(fake_site: FakeSite) -> FakeSite:
    """A site-packages with this core's version, whatever is really installed."""
    return fake_site
