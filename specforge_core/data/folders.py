"""Which files of a folder are trained on: those of rows, and of several splits the one for it."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..documents import parse_json
from ..errors import DataError
from ..progress import tell
from .formats import ENDINGS

NO_ROWS = re.compile(r"(dataset_infos?|dataset_dict|state|\w*config|manifest|\w*tokenizer.*)\.json")
# what may hold rows, and is not read where a folder is named
UNREAD = re.compile(
    r".+\.((csv|tsv|xlsx?|feather|orc|avro|pkl|pickle|zip|tar|tgz|7z|rar|lz4)"
    r"|(incomplete|part|crdownload)|(\w+\.)?(gz|zst|bz2|xz))",
    re.IGNORECASE,
)
TRAIN = ("train", "training")
# the names under which Hugging Face's `datasets` looks for splits
HELD_OUT = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SHARD = re.compile(r"(.+[-.])(\d{5})-of-(\d{5})(\..+)?")


def files_in(folder: Path) -> Iterator[Path]:
    """Yield a folder's files of rows; of a saved data set, those that it names, in its order.

    Raises DataError where there are none, or it is not clear which are meant.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _named(folder / "dataset_dict.json", "splits")
        if "train" not in splits and len(splits) != 1:
            shown = ", ".join(f"{folder}/{split}" for split in splits)
            raise DataError(
                f"data folder {str(folder)!r} holds several splits, and none is named train. "
                f"Name those that are meant: {shown}"
            )
        chosen_split = "train" if "train" in splits else splits[0]
        if others := [split for split in splits if split != chosen_split]:
            tell_once(
                f"note: of {str(folder)!r} {chosen_split} is read, and {', '.join(others)} is not"
            )
        folder /= chosen_split
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = [file.get("filename") for file in _named(folder / "state.json", "_data_files")]
        yield from (folder / Path(str(name)).name for name in names)
        return
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (path.name.endswith(ENDINGS) or UNREAD.fullmatch(path.name))
        and not NO_ROWS.fullmatch(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not any(path.name.endswith(ENDINGS) for path in files) or any(
        (folder / name).is_file() for name in ("manifest.json", "config.json")
    ):
        raise DataError(_no_data(folder))
    chosen = _to_train_on(folder, files)
    for path in chosen:
        if not path.name.endswith(ENDINGS):
            raise DataError(
                f"data folder {str(folder)!r} also holds {str(path.relative_to(folder))!r}, which "
                f"is not read as rows. {_name_them(folder, chosen)}"
            )
    _check_shards(folder, chosen)
    yield from chosen


def _to_train_on(folder: Path, files: Sequence[Path]) -> Sequence[Path]:
    """Return the files of the split to train on; all of them where none is named as held out."""
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for path in files:
        splits[_split(path.relative_to(folder))].append(path)
    others = [name for name in splits if not _is_held_out(name)]
    if len(others) == len(splits) or len(splits) == 1:
        return files
    if len(others) == 1 and others[0] is not None:
        left = ", ".join(str(name) for name in splits if name != others[0])
        tell_once(f"note: of {str(folder)!r} {others[0]} is read, and {left} is not")
        return splits[others[0]]
    if not others:
        first = ", ".join(str(paths[0]) for paths in splits.values())
        raise DataError(
            f"data folder {str(folder)!r} holds only files that are named as held out, of several "
            f"splits. Name the one that is meant: {first}"
        )
    raise DataError(
        f"data folder {str(folder)!r} holds files that are named as held out, and it is not clear "
        f"which are to train on. {_name_them(folder, [splits[name][0] for name in others])}"
    )


def held_out(files: Iterable[Path], source: Path) -> tuple[Path, ...]:
    """Return the files that are held out by their names below `source`, which does not say so.

    `source` is a folder, or a pattern.
    """
    parts = source.parts
    place = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if _is_held_out(_split(Path(*parts[max(0, place - 1) :]))):
        return ()
    base = Path(*parts[:place])
    return tuple(path for path in files if _is_held_out(_split(path.relative_to(base))))


def _is_held_out(split: str | None) -> bool:
    return split is not None and split.split("_")[0] in HELD_OUT


@cache
def tell_once(note: str) -> None:
    """Print a line, once however often a source is opened."""
    tell(note)


def _split(path: Path) -> str | None:
    """Return the split that a file's path names, as `train`, `test_sft` or, of `math_test`, `test`.

    None for no split.
    """
    for word in re.split(r"[^a-z_]+", str(path).lower()):
        parts = word.strip("_").split("_")
        for name in ("_".join(parts), parts[-1]):
            if name.split("_")[0] in (*TRAIN, *HELD_OUT):
                return name
    return None


def _name_them(folder: Path, files: Iterable[Path]) -> str:
    shown = [str(path) for path in files if path.name.endswith(ENDINGS)][:5]
    return f"Name those that are meant (patterns, too): data.train=[{', '.join(shown)}]"


def _check_shards(folder: Path, files: Iterable[Path]) -> None:
    """Raise DataError where a file says that it is one of several, and another is not there."""
    there = set(files)
    sets = {  # in their order
        (path.parent, found[1], found[3], found[4] or ""): None
        for path in files
        if (found := SHARD.fullmatch(path.name))
    }
    for place, name, count, ending in sets:
        for number in range(int(count)):
            shard = f"{name}{number:05}-of-{count}{ending}"
            if place / shard not in there:
                raise DataError(
                    f"data folder {str(folder)!r} lacks {shard}, so its download did not end. Get "
                    f"it again, or name the files: data.train=['{place}/{name}*']"
                )


def _no_data(folder: Path) -> str:
    said = f"data folder {str(folder)!r}"
    if (folder / "manifest.json").is_file():
        return f"{said} is a capture. Try: data.capture_dir={folder}, without data.train"
    if (folder / "config.json").is_file():
        return f"{said} is a model. Name a file or a folder of conversations: data.train=[PATH]"
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    return (
        f"{said} holds no file that is named as one of rows is ({', '.join(ENDINGS)}), but "
        f"{names:.200}. Name the files: data.train=[PATH]"
    )


def _named(path: Path, key: str) -> list[Any]:
    try:
        found = parse_json(path.read_bytes())[key]
        assert isinstance(found, list)
        assert found
    except (OSError, ValueError, TypeError, KeyError, AssertionError, RecursionError) as exc:
        raise DataError(
            f"{path} does not say which {key!r} the data set has, so it is damaged. Save it again"
        ) from exc
    return found
