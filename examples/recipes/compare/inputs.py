"""What the comparison begins with: a config for each method, and prompts where none are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from specforge_core.load import read_yaml
from specforge_core.plugins import STRATEGIES, discover
from specforge_core.strategy import Strategy

QUESTIONS = Path(__file__).parents[2] / "quickstart/train.jsonl"
DRAWS = 3  # of the quickstart's questions at temperature 1


def chosen(asked: str | None, own: dict[str, Any]) -> list[str]:
    """Return the methods asked for, else those installed but for what `own` has null for."""
    if asked:
        return asked.split(",")
    return [name for name in sorted(discover(STRATEGIES)) if own.get(name, {}) is not None]


def write_config(
    path: Path, method: str, common: Path, own: dict[str, Any], paths: dict[str, dict[str, Any]]
) -> None:
    """Write a method's config: what is common, of it the options that it has, its own, and paths.

    Relative paths in it are from the working directory.
    """
    raw, mine = read_yaml(common), own.get(method) or {}
    known = Strategy.load(method).config().model_fields
    shared = {key: value for key, value in raw.pop("strategy", {}).items() if key in known}
    raw["strategy"] = {"name": method, **shared, **mine.get("strategy", {})}
    raw["train"] = {**raw.get("train", {}), **mine.get("train", {})}
    for section, values in paths.items():
        raw[section] = {**raw.get(section, {}), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")


def write_prompts(folder: Path) -> Path:
    """Write the quickstart's questions as prompts.jsonl, DRAWS - 1 times each as samples.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for name, draws in (("prompts", 1), ("samples", DRAWS - 1)):
        again = [
            {"id": f"{row['id']}#{draw}", "messages": row["messages"][:1]}
            for draw in range(draws)
            for row in rows
        ]
        text = "".join(json.dumps(row) + "\n" for row in again)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
