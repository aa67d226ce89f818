"""What is said of the files that are named: that one is named twice, or that they are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import DataConfig
from specforge_core.data.files import GLANCE, glance, open_source, to_train_on
from specforge_core.data.folders import tell_once
from specforge_core.errors import DataError

from .rows_in_files import LINES, ROWS


def test_a_glance_tells_other_data_and_asks_nobody_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(bytes(3 * GLANCE))

    def seen(**changes: Any) -> str | None:
        return glance(DataConfig(**{"train": (str(path),), **changes}))

    found = {seen(), seen(limit=3), seen(validation=0.1), seen(train=(str(path), str(path)))}
    for place in (0, 3 * GLANCE - 1):  # what is in the middle is not looked at
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"1")
        found.add(seen())
    assert len(found) == 6
    assert None not in found
    assert seen() == seen(train=(str(tmp_path),))
    (tmp_path / "b.jsonl").write_bytes(bytes(GLANCE))
    two = [seen(train=(str(tmp_path),))]
    for place in (GLANCE - 1, 1):  # of several files less is looked at
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"1")
        two.append(seen(train=(str(tmp_path),)))
    assert two[0] == two[1] != two[2]
    for elsewhere in ("owner/name", "owner/name:split", "s3://bucket/name"):
        assert seen(train=(elsewhere,)) is None
    for gone in ("owner/name.jsonl", "gone"):
        with pytest.raises(DataError, match="does not exist"):
            seen(train=(gone,))


@pytest.mark.parametrize("other", ["d.jsonl", "./d.jsonl", "link.jsonl", "*.jsonl", ".", "e.jsonl"])
def test_a_file_that_is_named_twice_is_told_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    other: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tell_once.cache_clear()
    (tmp_path / "d.jsonl").write_bytes(LINES)
    if other == "link.jsonl":
        (tmp_path / other).symlink_to("d.jsonl")
    elif other == "e.jsonl":  # the same rows in another file are not looked for
        (tmp_path / other).write_bytes(LINES)
    rows = to_train_on(lambda source, _: open_source(source), "data.train")
    assert all(len(list(rows(name, DataConfig()))) >= len(ROWS) for name in ("d.jsonl", other))
    told = capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # all ranks have the same to say
    tell_once.cache_clear()
    again = to_train_on(lambda source, _: open_source(source), "data.train")
    assert all(again(name, DataConfig()) for name in ("d.jsonl", other))
    assert capsys.readouterr().err == ""
    said = f" twice, in 'd.jsonl' and in {other!r}: its conversations count twice"
    assert told.count(said) == (other != "e.jsonl")
