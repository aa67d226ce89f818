from __future__ import annotations

from pathlib import Path

import pytest

from specforge_core.config import RunConfig, TrainConfig

PAGE = Path(__file__).parent.parent / "docs" / "resume.md"


@pytest.mark.parametrize("option", TrainConfig.model_fields)
def test_the_page_says_of_every_option_of_a_training_whether_it_may_change(option: str) -> None:
    assert f"`{option}`" in PAGE.read_text() or f"`train.{option}`" in PAGE.read_text()


def test_the_page_says_so_of_every_section() -> None:
    text = PAGE.read_text()
    assert [name for name in RunConfig.model_fields if f"`{name}" not in text] == []
