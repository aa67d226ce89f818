"""Devices that a run may be given."""

from __future__ import annotations

import pytest

from specforge_core.devices import pick_device
from specforge_core.errors import ConfigError


@pytest.mark.parametrize(
    "name", ["meta", "banana", "cuda:99", "xla", "hpu", "privateuseone", "lazy"]
)
def test_what_computes_nothing_here_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"target.device '{name}' cannot be used: ") as error:
        pick_device(name, "target.device")
    assert str(error.value).endswith("Try: target.device=auto")


@pytest.mark.parametrize("name", ["", "cpu:-1", "x" * 10_000])
def test_a_name_that_is_none_has_a_short_message(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used: ") as error:
        pick_device(name, "train.device")
    assert len(str(error.value)) < 600


def test_the_cpu_is_taken() -> None:
    assert pick_device("cpu", "train.device").type == "cpu"
