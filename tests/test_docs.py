"""Docs say what is true: generated pages are up to date, named things exist."""

from __future__ import annotations

import inspect
import re
import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from specforge_core import hookspecs, types
from specforge_core.cli import cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["config", "hooks"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    path = ROOT / "scripts" / f"{page.removesuffix('s')}_docs.py"
    found = runpy.run_path(str(path))["render"]()
    assert (ROOT / f"docs/{page}.md").read_text() == found, f"run python {path}"


def test_the_hooks_page_has_every_argument_and_every_value_with_its_fields() -> None:
    page = (ROOT / "docs/hooks.md").read_text()
    parts = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    hooks = {n: hook for n, hook in vars(hookspecs).items() if n.startswith("specforge_")}
    values = {n: value for n, value in vars(types).items() if n[0].isupper() and not n.isupper()}
    assert set(parts) == hooks.keys() | values.keys()
    for name, hook in hooks.items():
        for argument in inspect.signature(hook).parameters.values():
            assert f"| `{argument.name}` | " in parts[name], name
    for name, value in values.items():
        for field in fields(value) if is_dataclass(value) else ():
            assert f"| `{field.name}` | " in parts[name], name
    for link in re.findall(r"\]\(#(\w+)\)", page):
        assert link in {name.lower() for name in parts}


def test_the_readme_lists_every_command_and_its_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `specforge (\w+)", text, re.M))
    assert listed == {*cli.commands, "doctor"}  # of specforge-doctor
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_readme_config_loads() -> None:
    from specforge_core.load import validate

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    run, _ = validate(yaml.safe_load(block), "README.md")
    assert run.strategy.name == "dflash"
