"""What a command's process does around its imports; its end is in test_cli and test_stop."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from specforge_core import process


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_a_command_looks_for_no_garbage_while_it_imports_nor_among_what_it_has_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_began", 0.0)
    before = gc.get_freeze_count()
    with process.importing():
        assert not gc.isenabled()
        module = [object()]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(found is module for found in gc.get_objects())
    with pytest.raises(ImportError), process.importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
def test_somebody_elses_process_keeps_its_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    with process.importing():
        assert gc.isenabled()
    monkeypatch.setattr(process, "_began", 0.0)
    gc.disable()
    with process.importing():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == before
