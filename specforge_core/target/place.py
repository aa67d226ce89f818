"""What is wrong with the place that `target.path` names, where nothing in it can be read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..config import TargetConfig

POINTER = b"version https://git-lfs"
READ = (".json", ".jinja", ".model", ".py", ".txt")  # besides weights, of which each file is opened


def wrong_with(path: str) -> str | None:
    """Return why nothing can be read at a `target.path`, and what to do; None if it may be right.

    There is no such folder, it is no saved model, or its files only stand for others.
    """
    try:
        return _wrong_with(path, Path(path))
    except OSError:  # what it is cannot be seen
        return None


def misread(path: str) -> str | None:
    """Return what to say of a `target.path` that libraries take for another, or would wait for.

    One file, two models, or a folder with a pipe or a device in it; None for any other.
    """
    with suppress(OSError):
        place = Path(path)
        if (place / "config.json").is_file() and (place / "adapter_config.json").is_file():
            return (
                f"target.path {path!r} has an adapter beside its weights, which one library adds "
                "and another does not. Merge them (peft: merge_and_unload, save_pretrained), or "
                f"take {place / 'adapter_config.json'} away"
            )
        for file in place.iterdir() if place.is_dir() else ():
            if file.is_fifo() or file.is_char_device():
                return f"{file} is no file, and would be waited for. Move it away"
        if place.is_file() and place.suffix == ".gguf":
            return _gguf(path)
        if place.is_file():
            return f"target.path {path!r} is a file. Try: target.path=DIRECTORY_OF_A_MODEL"
    return None


def _wrong_with(path: str, place: Path) -> str | None:
    if said := misread(path):
        return said
    if not place.is_dir():
        # a name of Hugging Face is NAME or OWNER/NAME
        local = path.startswith((".", "/", "~")) or path.count("/") > 1
        return (
            f"target.path {path!r} is no folder here. Try: target.path=DIRECTORY or a Hugging "
            "Face id"
            if local
            else None
        )
    if not (place / "config.json").is_file():
        if (place / "adapter_config.json").is_file():
            return (
                f"target.path {path!r} is an adapter without its model. Merge them and save the "
                "result (peft: merge_and_unload, save_pretrained), then target.path=DIRECTORY"
            )
        if any(place.glob("*.gguf")):
            return _gguf(path)
        return (
            f"target.path {path!r} has no config.json: it is not a saved model. "
            "Try: target.path=DIRECTORY_OF_A_MODEL"
        )
    if any(place.glob("*.gguf")) and not any(place.glob("*.safetensors")):
        return _gguf(path)
    files = sorted(file for file in place.iterdir() if file.suffix in READ)
    return next((said for file in files if (said := pointer(file))), None)


def _gguf(path: str) -> str:
    return (
        f"target.path {path!r} holds weights in GGUF, which are not read. "
        "Try: target.path= the checkpoint in safetensors that they were made of"
    )


def runs_code(target: TargetConfig, exc: Exception) -> str | None:
    """Return what to say of an error that asks for leave to run the target's own code."""
    if target.trust_remote_code or "trust_remote_code" not in str(exc):
        return None
    revision = f" at revision {target.revision!r}" if target.revision else ""
    return (
        f"target.path {target.path!r}{revision} brings Python code of its own, which is not run "
        "unasked. Try: target.trust_remote_code=true, if you trust its authors"
    )


def pointer(file: Path) -> str | None:
    """Return what to say of a file that is a pointer of git-lfs; None for any other."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) != POINTER:
            return None
    return (
        f"{file} is a pointer of git-lfs, not the file it stands for. "
        f"Try: git lfs pull, in {file.parent}"
    )
