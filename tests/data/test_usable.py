"""Why nothing can be trained on: what is said is true of the data, and helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data.files import open_source
from specforge_core.data.usable import UNSUPERVISED
from specforge_core.errors import DataError
from specforge_core.testing.toy import toy_tokenizer

from .prompted import load_prompts, write

TOKENIZER = toy_tokenizer()
ZERO = {"input_ids": [*range(20)], "loss_mask": [0] * 20}
LATE = {"input_ids": [*range(20)], "loss_mask": [0] * 15 + [1] * 5}


def load(folder: Path, *rows: dict[str, Any], positions: int = 512, **options: Any) -> Any:
    path = write(folder / "d.jsonl", *rows)
    data = DataConfig(train=(str(path),), **options)
    return load_prompts(
        data, TOKENIZER, len(TOKENIZER), lambda name, _: open_source(name), positions=positions
    )


@pytest.mark.parametrize(
    ("rows", "options", "said", "unsaid"),
    [
        ([ZERO] * 2, {}, "none of 2 .*2 without a supervised token.*loss_mask is 0 everywh", "Try"),
        # nor is the length of a row to blame that is cut: all of it is 0
        ([ZERO], {"max_length": 8}, "loss_mask is 0 everywhere", "max_length"),
        ([ZERO], {"max_length": 8, "too_long": "skip"}, "loss_mask is 0 everywhere", "max_length"),
        ([ZERO], {"max_length": 8, "too_long": "raise"}, "loss_mask is 0 everywhere", "max_length"),
        (
            [LATE],
            {"max_length": 8},
            "1 without an answer in data.max_length.* data.max_length=16,",
            "loss_mask",
        ),
        (
            [LATE, ZERO],
            {"max_length": 8, "too_long": "skip"},
            "1 too long, 1 without a supervised token.*max_length=16, or data.too_long=truncate",
            "everywhere",
        ),
        (
            [LATE],
            {"positions": 8},
            "in the target's positions.*target takes 8 tokens. Try: shorter",
            "data.max_length",
        ),
    ],
)
def test_nothing_to_train_on_has_its_true_reason(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], said: str, unsaid: str
) -> None:
    with pytest.raises(DataError, match=said) as error:
        load(tmp_path, *rows, **options)
    assert unsaid not in str(error.value)


def test_rows_of_which_nothing_is_supervised_are_counted(tmp_path: Path) -> None:
    prompts = load(tmp_path, ZERO, LATE, max_length=16)
    assert len(prompts) == 1
    assert prompts.skipped == {UNSUPERVISED: 1}
