"""Rules of the code base that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import specforge_core

ROOT = Path(__file__).parent.parent
CORE = Path(specforge_core.__file__).parent
SOURCES = sorted(CORE.rglob("*.py"))

# a module may import from its own layer and the ones above it
LAYERS = (
    {"types", "errors"},
    {"hookspecs"},
    {"plugins", "progress", "http_json", "locks"},
    {"strategy"},
    {"config", "listing"},
    {"data", "capture", "train", "evaluate", "export", "ops", "defaults"},
    {"restore"},
    {"doctor"},
    {"cli"},
    {"testing"},
)
HEAVY = {"torch", "transformers", "numpy", "safetensors", "matplotlib", "pydantic"}
LIGHT = ("cli", "plugins", "hookspecs", "types", "errors", "listing")


def layer(path: Path) -> int:
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    if part == "__init__":
        return 1
    (found,) = (i for i, names in enumerate(LAYERS) if part in names)
    return found


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, at module level, for typing only) of each import, relative ones resolved."""
    tree = ast.parse(path.read_text())
    package = ["specforge_core", *path.relative_to(CORE).parts[:-1]]
    found = []

    def visit(node: ast.AST, top: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, child.module] if child.module else base)
                found.append((module, top, typing))
                found.extend((f"{module}.{a.name}", top, typing) for a in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                visit(child, top, True)
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, top and not inner, typing)

    visit(tree, True, False)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CORE)))
def test_imports_point_one_way(path: Path) -> None:
    for module, top, typing in imports(path):
        if not module.startswith("specforge_core.") or typing or not top:
            continue
        target = CORE / (module.split(".")[1] + ".py")
        if target.exists() or target.with_suffix("").is_dir():
            assert layer(target) <= layer(path), f"{path} imports {module}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    for module, top, typing in imports(CORE / f"{name}.py"):
        assert not top or typing or module.split(".")[0] not in HEAVY, module


def test_only_the_facade_calls_hooks() -> None:
    callers = {p.name for p in SOURCES if "pm.hook." in p.read_text()}
    assert callers == {"strategy.py", "plugins.py"} or callers == {"strategy.py"}


def test_the_core_names_no_strategy() -> None:
    names = {ep.name for ep in entry_points(group="specforge.strategies")} | {"eagle", "medusa"}
    names -= {"linear"}  # an ordinary word; its package's name is not
    names |= {"specforge_linear", "specforge-linear"}
    for path in SOURCES:
        text = path.read_text().lower()
        for name in names:
            assert not re.search(rf"(?<![a-z]){re.escape(name)}", text), f"{path} names {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CORE)))
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


def test_no_pickle_is_read() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path


@pytest.mark.parametrize("arguments", [["strategies"], ["--help"], ["train", "--help"]])
def test_the_cli_starts_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from specforge_core import cli\n"
        f"sys.argv = ['specforge', *{arguments!r}]\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
