from __future__ import annotations

import pytest

from specforge_core import stop
from specforge_core.testing.plugin import FakeSite

# here a run that is stopped ends in the process of all the tests, and who takes too long is ended
# together with it
stop.SECONDS = 120.0


@pytest.fixture
def env(fake_site: FakeSite) -> FakeSite:
    """A site-packages with this core's version, whatever is really installed."""
    return fake_site


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that no process has one left at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
