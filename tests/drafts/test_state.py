from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_core.checksums import checksum
from specforge_core.drafts.state import CHECKSUMS, STATE, read_state
from specforge_core.errors import CheckpointError


def test_a_state_that_is_as_it_was_written_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    data = b'{"surprise": 1}'
    (path / STATE).write_bytes(data)
    (path / CHECKSUMS).write_text(json.dumps({STATE: checksum(data)}))
    said = r"is whole, but another version of specforge_core wrote it: .*Try: output_dir=ANOTHER$"
    with pytest.raises(CheckpointError, match=said):
        read_state(path)
    (path / STATE).write_bytes(b'{"surprise": 2}')
    with pytest.raises(CheckpointError, match="is damaged: its checksum is"):
        read_state(path)
