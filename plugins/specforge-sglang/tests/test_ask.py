"""Request ids say what to capture, and nothing else is understood."""

from __future__ import annotations

import pytest
from specforge_sglang_capture.ask import Ask, parse


@pytest.mark.parametrize(
    "ask",
    [
        Ask("7-3", "files", "specforge-1-a_b", (-1, 2, 35), "none"),
        Ask("7-3", "http", "10.0.0.1:4000/to-k_en", (), "post_norm"),
        Ask("0-0", "http", "[::1]:4000/t", (3,), "pre_norm"),
    ],
)
def test_an_ask_survives_as_a_request_id(ask: Ask) -> None:
    assert parse(str(ask)) == ask


@pytest.mark.parametrize(
    "text",
    [
        "7f2c9e",  # someone else's request
        "specforge|1",
        "specforge|2|files|d|1|none|n",
        "specforge|1|files|../etc|1|none|n",
        "specforge|1|files|a/b|1|none|n",
        "specforge|1|files|d|1|none|../n",
        "specforge|1|ftp|d|1|none|n",
        "specforge|1|http|host/a/b|1|none|n",
        "specforge|1|files|d|1-2|none|n",
        "specforge|1|files|d|x|none|n",
        "specforge|1|files|d|1|normed|n",
        "specforge|1|files|d|1|none|n|more",
    ],
)
def test_anything_else_asks_for_nothing(text: str) -> None:
    assert parse(text) is None
