"""What the options say, and which are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from specforge_eagle3.config import shape_fields
from specforge_peagle.config import PeagleConfig

from specforge_core.errors import ConfigError


def test_what_it_shares_with_eagle3_says_nothing_that_holds_for_that_alone(kit: Any) -> None:
    for name, field in PeagleConfig.model_fields.items():
        assert "EAGLE" not in (field.description or ""), name
        assert "SGLang" not in (field.description or ""), name  # it serves none of these drafts
    with pytest.raises(ConfigError, match="a target of 3 layers is too small") as raised:
        shape_fields(kit.config(), replace(kit.target(), num_layers=3))
    assert "EAGLE" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_length": 5}, "draft_length 5 is more than the 4 depths"),
        ({"lk_decay": 1.0}, "lk_decay has no effect with loss 'kl'"),
    ],
)
def test_options_that_do_not_agree(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kit.config(**options)
