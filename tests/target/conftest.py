"""A target that the tests of this folder share."""

from __future__ import annotations

import pytest

from specforge_core.config import TargetConfig

from .small import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    return save(tmp_path_factory.mktemp("llama"), "Llama")
