"""Which files of a folder are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_core.config import DataConfig
from specforge_core.data.files import FileRows, open_source, to_train_on
from specforge_core.errors import DataError

from .rows_in_files import ROWS, ids, read

datasets = pytest.importorskip("datasets", reason="of the extra `datasets`")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "but nothing. Name the files"),
        (("x.csv",), r"\(\.jsonl, .*, but x\.csv"),
        (("manifest.json", "d.jsonl"), "is a capture. Try: data.capture_dir="),
        (("config.json", "model.safetensors"), "is a model"),
    ],
)
def test_folders_without_data(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "read_files"),
    [
        # as data sets are laid out for the Hugging Face hub
        (
            "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl README.md "
            "data/test-00000-of-00001.jsonl data/validation-00000-of-00001.jsonl",
            "data/train-00000-of-00002.jsonl data/train-00001-of-00002.jsonl",
        ),
        ("train.jsonl test.jsonl", "train.jsonl"),
        ("test/a.jsonl train/a.jsonl train/eval.jsonl", "train/a.jsonl train/eval.jsonl"),
        (
            "c4-train.00000-of-00001.jsonl c4-dev.00000-of-00001.jsonl",
            "c4-train.00000-of-00001.jsonl",
        ),
        (
            "train_sft-00000-of-00001.jsonl test_sft-00000-of-00001.jsonl",
            "train_sft-00000-of-00001.jsonl",
        ),
        ("train.jsonl test.csv", "train.jsonl"),
        (
            "gsm8k_train_1.jsonl gsm8k_train_2.jsonl gsm8k_test.jsonl",
            "gsm8k_train_1.jsonl gsm8k_train_2.jsonl",
        ),
        # without one that is held out all of it is meant
        ("test.jsonl", "test.jsonl"),
        ("eval/1.jsonl eval/2.jsonl", "eval/1.jsonl eval/2.jsonl"),
        ("latest.jsonl train.jsonl train_math.jsonl", "latest.jsonl train.jsonl train_math.jsonl"),
        (
            "train_gen.jsonl train_sft.jsonl test_sft.jsonl",
            r"held out, and it is not clear .*: data",
        ),
        (
            "chats.jsonl test.jsonl",
            r"held out, .*: data\.train=\[[^,]*/chats\.jsonl\]$",
        ),
        (
            "dev.jsonl test.jsonl",
            r"only files .* of several splits\. Name the one .*: .*/dev\.jsonl,",
        ),
        (
            "chats.jsonl train.jsonl dev.jsonl",
            "held out, and it is not clear which are to train on",
        ),
        # a download that did not end
        ("data/train-00000-of-00002.jsonl", r"lacks train-00001-of-00002\.jsonl, so its download"),
        ("a.jsonl b.jsonl.incomplete", r"also holds 'b\.jsonl\.incomplete', which is not read"),
        # rows that would be missed
        (
            "a.jsonl b.csv",
            r"also holds 'b\.csv', which is not read .*: data\.train=\[.*/a\.jsonl\]",
        ),
        ("a.jsonl b.parquet.gz", r"also holds 'b\.parquet\.gz', which is not read as rows"),
        ("a.jsonl LICENSE.txt notes.md x.py .gitattributes", "a.jsonl"),
    ],
)
def test_of_a_folder_what_is_held_out_is_not_trained_on_and_nothing_is_missed(
    tmp_path: Path, names: str, read_files: str
) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    if read_files.split()[0] in names.split():
        found = [one.where.removesuffix(":1") for one in read(tmp_path)]
        assert found == read_files.split()
    else:
        with pytest.raises(DataError, match=read_files):
            read(tmp_path)


@pytest.mark.parametrize(
    ("names", "source", "trained", "said"),
    [
        ("test.jsonl", "", "", r"are named as held out.*: data\.train=\[[^,]*/d/test\.jsonl\]"),
        ("test/1.jsonl test/2.jsonl", "", "", r"data\.train=\[.*test/1\.jsonl, .*test/2\.jsonl\]"),
        (
            " ".join(f"test/{i}.jsonl" for i in range(9)),
            "",
            "",
            r"data\.train=\['[^,]*/d/test/\*'\]$",
        ),
        ("test/1.jsonl", "test", "test/1.jsonl", ""),
        ("math_test.jsonl", "math_test.jsonl", "math_test.jsonl", ""),
        ("train.jsonl test.jsonl", "", "train.jsonl", "/d' train is read, and test is not"),
        # a pattern is no name, unless it has the split in it
        ("test.jsonl", "*.jsonl", "", r"are named as held out.*: data\.train=\[.*/test\.jsonl\]"),
        ("a.jsonl dev/1.jsonl", "**/*.jsonl", "a.jsonl", "dev/1.jsonl is left out, as the name"),
        ("a.jsonl test.jsonl", "te*.jsonl", "", "are named as held out"),
        ("a.jsonl test-1.jsonl", "test-*.jsonl", "test-1.jsonl", ""),
        ("test/1.jsonl", "test/*.jsonl", "test/1.jsonl", ""),
        (
            "data/train/1.jsonl data/test/1.jsonl",
            "data/*/*.jsonl",
            "data/train/1.jsonl",
            "left out",
        ),
    ],
)
def test_what_is_held_out_is_trained_on_only_by_its_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: str,
    source: str,
    trained: str,
    said: str,
) -> None:
    folder = tmp_path / "d"  # the test's own names it
    for name in names.split():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}")
    asked = str(folder / source)
    plain = open_source(asked)

    def rows() -> object:
        return to_train_on(lambda name, _: open_source(name), "data.train")(asked, DataConfig())

    assert isinstance(plain, FileRows)
    if not trained:
        with pytest.raises(DataError, match=said):
            rows()
        assert plain.files  # read as what is validated with, or evaluated on
        return
    _, found = rows(), rows()
    assert isinstance(found, FileRows)
    assert [str(path.relative_to(folder)) for path in found.files] == [trained]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said)  # once, however often it is opened
    assert said in "".join(lines)


def test_a_split_of_a_folder_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").touch()
    for split, named in {"test": f"{tmp_path}/test.jsonl", "dev": f"{tmp_path}/FILE"}.items():
        with pytest.raises(DataError, match=rf"NAME:SPLIT is of Hug.*data\.train=\[{named}\]"):
            open_source(f"{tmp_path}:{split}")


def test_saved_data_sets_are_read_in_their_own_order(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert ids(read(tmp_path / "one")) == [row["id"] for row in ROWS]
    splits = {"test": made.select(range(5)), "train": made.select(range(5, 9))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert ids(read(tmp_path / "splits")) == ["5", "6", "7", "8"]
    assert ids(read(tmp_path / "splits/test")) == ["0", "1", "2", "3", "4"]
    datasets.DatasetDict({"x": splits["test"], "y": splits["test"]}).save_to_disk(
        str(tmp_path / "none")
    )
    with pytest.raises(DataError, match=r"none is named train\. Name those .*none/x, .*none/y"):
        read(tmp_path / "none")
    (tmp_path / "one/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json does not say which '_data_files'"):
        read(tmp_path / "one")
