"""Request ids say what to capture, and nothing else is understood."""

from __future__ import annotations

import pytest
from specforge_sglang_capture.ask import Ask, parse


@pytest.mark.parametrize(
    "ask",
    [
        Ask("7-3", "files", "specforge-1-a_b", (-1, 2, 35), "none"),
        Ask("7-3", "http", "10.0.0.1:4000/to-k_en", (), "post_norm"),
        Ask("0-0", "http", "[::1]:4000/t", (3,), "pre_norm", ("logsumexp",)),
        Ask("0-0", "files", "d", (3,), "none", ("next_tokens", "logsumexp")),
    ],
)
def test_an_ask_survives_as_a_request_id(ask: Ask) -> None:
    assert parse(str(ask)) == ask


@pytest.mark.parametrize(
    "text",
    [
        "7f2c9e",  # someone else's request
        "specforge|2",
        "specforge|2|files|d|1|none|n",
        "specforge|x|files|d|1|none||n",
        "specforge|2|files|../etc|1|none||n",
        "specforge|2|files|a/b|1|none||n",
        "specforge|2|files|d|1|none||../n",
        "specforge|2|ftp|d|1|none||n",
        "specforge|2|http|host/a/b|1|none||n",
        "specforge|2|files|d|1-2|none||n",
        "specforge|2|files|d|x|none||n",
        "specforge|2|files|d|1|normed||n",
        "specforge|2|files|d|1|none|logits|n",
        "specforge|2|files|d|1|none||n|more",
        "specforge|1|files|../etc|1|none|n",
        "specforge|2|files|d|1|none||lock",  # files of the directory's own
        "specforge|2|files|d|1|none||free-1-1",
    ],
)
def test_anything_else_asks_for_nothing(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "text", ["specforge|1|files|d|1,2|none|7-3", "specforge|9|files|d|of|another|shape|7-3"]
)
def test_another_protocol_is_understood_enough_to_refuse_it(text: str) -> None:
    found = parse(text)
    assert found is not None
    assert (found.way, found.place, found.name) == ("files", "d", "7-3")
    assert str(found.protocol) == text.split("|")[1]
