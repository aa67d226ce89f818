"""`specforge new`: a package that works, to begin from."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import version
from pathlib import Path

from .errors import ConfigError
from .files import make_folder, refusing, write_file
from .plugins import CORE

TEMPLATES = Path(__file__).parent / "templates"
LEFT_OUT = "__pycache__"  # of who ran a template's own tests


def kinds() -> list[str]:
    """Return what can be begun."""
    return sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())


def write_package(name: str, kind: str, directory: Path) -> list[Path]:
    """Write a package `specforge-NAME` into a new directory; return its files.

    Raises ConfigError for a name that Python or the package index would refuse, or a
    directory that is not empty.  A template's `.in` hides a file from tools of this repository.
    """
    if kind not in kinds():
        raise ConfigError(f"there is no kind {kind!r}. Try: --kind {', '.join(kinds())}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name!r} is no name of a package: small letters and digits, parts joined by '-'. "
            "Try: specforge new my-method"
        )
    module = name.replace("-", "_")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there and not empty. Try: -o ANOTHER_DIRECTORY")
    major, minor, *_ = version(CORE).split(".")
    words = {
        "template_tests": "tests",  # a wheel of the core has no tests
        "CORE_VERSION": f"{major}.{minor}",
        "NEXT_VERSION": f"{major}.{int(minor) + 1}",
        "specforge-example": f"specforge-{name}",
        "Example": "".join(part.capitalize() for part in name.split("-")),
        "example": module,
    }
    written: list[Path] = []
    there = directory.exists()
    try:
        with refusing(ConfigError, "Make room there, or try: -o ANOTHER_DIRECTORY", directory):
            _write(kind, words, directory, written)
    except BaseException:
        for path in directory.glob("*"):  # which was empty
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not there and directory.is_dir():
            directory.rmdir()
        raise
    return written


def _write(kind: str, words: dict[str, str], directory: Path, written: list[Path]) -> None:
    for source in sorted((TEMPLATES / kind).rglob("*")):
        if source.is_dir() or LEFT_OUT in source.parts:
            continue
        path = str(source.relative_to(TEMPLATES / kind)).removesuffix(".in")
        place = directory / _filled(path, words)
        make_folder(place.parent)
        write_file(place, _filled(source.read_text(encoding="utf-8"), words).encode())
        written.append(place)


def _filled(text: str, words: dict[str, str]) -> str:
    for word, instead in words.items():
        text = text.replace(word, instead)
    return text
