"""Docs say what is true: generated pages are up to date, named things exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from specforge_core.cli import cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["config", "hooks"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    path = ROOT / "scripts" / f"{page.removesuffix('s')}_docs.py"
    found = runpy.run_path(str(path))["render"]()
    assert (ROOT / f"docs/{page}.md").read_text() == found, f"run python {path}"


def test_the_readme_lists_every_command_and_its_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `specforge (\w+)", text, re.M)) == set(cli.commands)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_readme_config_loads() -> None:
    from specforge_core.load import validate

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    run, _ = validate(yaml.safe_load(block), "README.md")
    assert run.strategy.name == "dflash"
