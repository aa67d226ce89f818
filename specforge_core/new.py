"""`specforge new`: a package that works, to begin from."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from .errors import ConfigError
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
    written = []
    for source in sorted((TEMPLATES / kind).rglob("*")):
        if source.is_dir() or LEFT_OUT in source.parts:
            continue
        path = str(source.relative_to(TEMPLATES / kind)).removesuffix(".in")
        place = directory / _filled(path, words)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_filled(source.read_text(encoding="utf-8"), words), encoding="utf-8")
        written.append(place)
    return written


def _filled(text: str, words: dict[str, str]) -> str:
    for word, instead in words.items():
        text = text.replace(word, instead)
    return text
