"""`specforge new`: a package that works, to begin from."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import defaults
from .errors import ConfigError
from .files import make_folder, refusing, write_file
from .plugins import CORE, find_strategy

TEMPLATES = Path(__file__).parent / "templates"
VARIANT, TRANSFORM = "variant", "specforge_transform"
LEFT_OUT = "__pycache__"  # of who ran a template's own tests


def kinds() -> list[str]:
    """Return what can be begun."""
    return sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())


def write_package(
    name: str,
    kind: str,
    directory: Path,
    of: str | None = None,
    overrides: tuple[str, ...] = (),
) -> list[Path]:
    """Write a package `specforge-NAME` into a new directory; return its files.

    A variant is one `of` a strategy that is installed; `overrides` (strategy.KEY=VALUE) are the
    options of that one which suit a toy target, for the tests.  Raises ConfigError for a name
    that Python or the package index would refuse, or a directory that is not empty, PluginError
    for a strategy that does not load.  A template's `.in` hides a file from tools of this
    repository.
    """
    if kind not in kinds():
        raise ConfigError(f"there is no kind {kind!r}. Try: --kind {', '.join(kinds())}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name!r} is no name of a package: small letters and digits, parts joined by '-'. "
            "Try: specforge new my-method"
        )
    if kind == VARIANT and of is None:
        raise ConfigError(
            "a variant is one of a method that is installed (`specforge strategies`). "
            f"Try: specforge new {name} --kind {VARIANT} --of METHOD"
        )
    if kind != VARIANT and (of is not None or overrides):
        extra = f"--of {of}" if of is not None else overrides[0]
        raise ConfigError(f"--kind {kind} begins no variant of another method. Take {extra} out")
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
        **({} if of is None else _parent(of, overrides)),
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


def _parent(name: str, overrides: tuple[str, ...]) -> dict[str, str]:
    """Return what a variant's files say of the strategy whose hooks it imports."""
    from .load import apply_override
    from .strategy import Strategy

    raw: dict[str, Any] = {"strategy": {}}
    for override in overrides:
        apply_override(raw, override)
    strategy, installed = Strategy.load(name), find_strategy(name)
    plugin, config = strategy.pm.get_plugin(name), strategy.config()
    callers = strategy.pm.get_hookcallers(plugin) or []
    hooks = sorted({caller.name for caller in callers} - {"specforge_config", TRANSFORM})
    transform = getattr(plugin, TRANSFORM, None) or defaults.specforge_transform
    options = (f"    {_code(key)}: {_code(value)},\n" for key, value in raw["strategy"].items())
    given = (f"{argument}={argument}" for argument in inspect.signature(transform).parameters)
    major, minor, *_ = installed.version.split(".")
    return {
        "PARENT_NAME": name,
        "    # PARENT_OPTIONS\n": "".join(options),
        "PARENT_OVERRIDES": "".join(f" {override}" for override in overrides),
        "PARENT_DIST": installed.dist,
        "PARENT_VERSION": f"{major}.{minor}",
        "PARENT_MODULE": installed.entry_point.module,
        "PARENT_HOOKS": "".join(f"    {hook},\n" for hook in hooks),
        "PARENT_CONFIG_MODULE": config.__module__,
        "PARENT_CONFIG": config.__name__,
        "PARENT_TRANSFORM": transform.__module__,
        "PARENT_ARGUMENTS": ", ".join(given),
    }


def _code(value: object) -> str:
    """Return a value of JSON as Python's formatters write it."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


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
