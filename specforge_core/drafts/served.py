"""What a user is told of an export: the command by which each engine serves it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .export import read_provenance, read_serve


def after_export(place: Path, format: str) -> str:
    """Return what a user is told of an export: how an engine serves it, and what comes next."""
    told = read_provenance(place)
    serve, environment = told.get("serve") or {}, told.get("environment") or {}
    named = [format] if format in serve else sorted(serve)
    target = str(told.get("target") or "TARGET")
    lines = [
        f"{engine} serves it with: "
        + " ".join(_set(environment.get(engine) or {}) + command(engine, options, target, place))
        for engine in named
        if (options := read_serve(place, engine))
    ]
    try_ = f"Try: specforge eval -c RUN.yaml --draft {shlex.quote(str(place))}"
    return "\n".join([f"wrote {place}", *lines, try_])


def command(engine: str, options: Mapping[str, Any], target: str, draft: Path) -> list[str]:
    """Return the words, quoted, that start an engine with `options`, as `read_serve` gives them.

    Of an engine that is not known here they are the options alone.
    """
    if engine == "sglang":
        given = {"model_path": target, "speculative_draft_model_path": str(draft), **options}
        flags = [
            [f"--{name.lstrip('-').replace('_', '-')}", *([] if value is True else [str(value)])]
            for name, value in given.items()
            if value is not False
        ]
        words = ["python", "-m", "sglang.launch_server", *(word for flag in flags for word in flag)]
        return [shlex.quote(word) for word in words]
    if engine == "vllm":
        config = json.dumps({"model": str(draft), **options})
        return ["vllm", "serve", shlex.quote(target), "--speculative-config", shlex.quote(config)]
    return _set(options)


def _set(values: Mapping[str, Any]) -> list[str]:
    # of a name that is quoted too, a shell would make a command
    return [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
