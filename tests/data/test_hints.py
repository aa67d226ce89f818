"""What the advised commands make of rows that are no conversations."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from specforge_core.data.hints import of_row
from specforge_core.data.messages import parse


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(
    ("rows", "questions"),
    [
        (
            # the first row says nothing of the others' input
            [{"instruction": q, "input": i, "output": "3"} for q, i in (("A", ""), ("B", "1"))],
            ["A", "B\n\n1"],
        ),
        ([{"instruction": "A", "context": "c", "response": "3"}], ["A\n\nc"]),
        ([{"input": "A", "output": "3"}], ["A"]),
        ([{"prompt": "A"}], ["A"]),
        ([{"prompt": [{"role": "user", "content": "A"}]}], ["A"]),
        ([{"question_id": 1, "turns": ["A", "B"]}], ["A", "B"]),
        ([{"model": "m", "conversation": [{"from": "human", "value": "A"}]}], ["A"]),
    ],
)
def test_the_advised_command_leaves_no_question_out(
    tmp_path: Path, rows: list[dict[str, Any]], questions: list[str]
) -> None:
    (tmp_path / "FILE").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = str(of_row(rows[0])).partition("Try: ")[2]
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    found = [parse(json.loads(line)) for line in (tmp_path / "FILE.jsonl").read_text().splitlines()]
    asked = [m["content"] for one in found for m in one.messages if m["role"] == "user"]
    assert asked == questions
