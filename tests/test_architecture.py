"""Rules of the code base that no linter knows."""

from __future__ import annotations

import ast
import functools
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

# A folder imports from itself and those before it.  `target` stands before `data` here, though a
# sample meets them the other way round (test_walk.py): rows are made of the target's tokens.
FOLDERS = ("types", "target", "data", "capture", "batches", "drafts", "evaluate", "train")
BESIDE = ("nn", "testing", "templates")  # for packages; no folder of the core imports them
# of the modules at the root, these put the folders together; the others know none but types
ON_TOP = {"cli", "commands", "deep", "defaults"}
SUITE = ("deep", "testing")  # it runs the suite that is there
ENGINES = sorted(
    path
    for name in ("specforge_sglang", "specforge_sglang_capture", "specforge_openai")
    for path in (ROOT / "plugins").glob(f"*/{name}/**/*.py")
)
HEAVY = {"torch", "transformers", "numpy", "safetensors", "matplotlib", "pydantic"}
LIGHT = ("cli", "plugins", "hookspecs", "errors", "listing")


def room(path: Path) -> str:
    """Return the folder of a file, or the name of a module at the root."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, at module level, for typing only) of each import, relative ones resolved."""
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

    visit(parsed(path), True, False)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(CORE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imported(path: Path) -> set[str]:
    """Return the core's modules that a file imports anywhere, for typing too."""
    named = {module for module, _, _ in imports(path)} & MODULES.keys() - {module_name(path)}
    # `from package import module` names both
    return {one for one in named if not any(other.startswith(f"{one}.") for other in named)}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that can reach each other."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    }
    return [set(group) for group in groups]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set[str]()}
    assert circles(graph) == [{"a", "b", "c"}]
    assert circles({**graph, "c": set()}) == []


def test_no_modules_import_each_other_even_in_functions_and_for_typing() -> None:
    assert circles({name: imported(path) for name, path in MODULES.items()}) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CORE)))
def test_folders_import_one_way(path: Path) -> None:
    mine = room(path)
    for target in imported(path):
        other = room(MODULES[target])
        if other == mine or other not in (*FOLDERS, *BESIDE):
            continue
        if mine in FOLDERS:
            assert other in FOLDERS[: FOLDERS.index(mine)], f"{path} imports {target}"
        elif mine == "nn":
            assert other in ("types", "drafts"), f"{path} imports {target}"
        elif mine not in BESIDE:
            allowed = other == "types" or (mine in ON_TOP and other in FOLDERS)
            assert allowed or (mine, other) == SUITE, target


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    for module, top, typing in imports(CORE / f"{name}.py"):
        assert not top or typing or module.split(".")[0] not in HEAVY, module


@pytest.mark.parametrize("path", sorted((CORE / "types").glob("*.py")), ids=lambda p: p.name)
def test_the_values_that_pass_import_nothing_heavy(path: Path) -> None:
    for module, _, typing in imports(path):
        assert typing or module.split(".")[0] not in HEAVY, module


@pytest.mark.parametrize("path", sorted((CORE / "types").glob("*.py")), ids=lambda p: p.name)
def test_the_values_that_pass_can_get_more_fields(path: Path) -> None:
    decorators = [
        ast.unparse(decorator)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if ast.unparse(decorator) != "runtime_checkable"
    ]
    assert set(decorators) <= {"dataclass(frozen=True, slots=True, kw_only=True)"}


def test_only_the_facade_calls_hooks() -> None:
    callers = {p.name for p in SOURCES if "pm.hook." in p.read_text()}
    assert callers == {"strategy.py", "plugins.py"} or callers == {"strategy.py"}


@functools.cache
def methods() -> set[str]:
    """Return the names of methods, here and elsewhere, and of their packages."""
    names = {ep.name for ep in entry_points(group="specforge.strategies")}
    names |= {"eagle", "medusa", "dflash", "domino", "dspark", "lilicorr", "p-eagle", "hydra"}
    names -= {"linear"}  # an ordinary word; its package's name is not
    return names | {"specforge_linear", "specforge-linear"}


def naming(text: str) -> list[str]:
    return [n for n in methods() if re.search(rf"(?<![a-z]){re.escape(n)}", text.lower())]


def test_the_core_names_no_method() -> None:
    assert naming("EAGLE3 and a linear layer") != []
    assert naming("a linear layer") == []
    for path in SOURCES:
        assert naming(path.read_text()) == [], path


@pytest.mark.parametrize("path", ENGINES, ids=lambda p: str(p.relative_to(ROOT / "plugins")))
def test_engine_packages_have_no_string_that_names_a_method(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert naming(node.value) == [], f"{path}:{node.lineno}"


def too_long(text: str) -> list[str]:
    """Return what is longer than it may be in a file: a screen or so for what one idea is."""
    found = [f"{lines} lines"] if (lines := len(text.splitlines())) > 300 else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # a kernel's loop and the sums that it keeps in registers are one piece
            kernel = any("triton.jit" in ast.unparse(one) for one in node.decorator_list)
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > (120 if kernel else 60):
                found.append(f"{node.name}: {lines} lines")
    return found


def test_what_is_too_long_is_found() -> None:
    assert too_long("x = 1\n" * 300) == []
    assert too_long("x = 1\n" * 301) == ["301 lines"]
    body = "    x = 1\n"
    assert too_long(f"def f():\n{body * 59}") == []
    assert too_long(f"async def f():\n{body * 60}") == ["f: 61 lines"]
    assert too_long(f"class A:\n    def f():\n{('    ' + body) * 60}") == ["f: 61 lines"]
    assert too_long(f"@triton.jit\ndef f():\n{body * 119}") == []
    assert too_long(f"@triton.jit\ndef f():\n{body * 120}") == ["f: 121 lines"]


def test_no_file_and_no_function_is_too_long() -> None:
    """Of the whole repository: packages, tests, examples and benchmarks as well."""
    folders = ("specforge_core", "tests", "plugins", "examples", "benchmarks", "scripts")
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    assert len(paths) > len(SOURCES)
    found = {str(path.relative_to(ROOT)): too_long(path.read_text()) for path in paths}
    assert {path: what for path, what in found.items() if what} == {}


def test_no_pickle_is_read() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path


@pytest.mark.parametrize(
    ("arguments", "imported"),
    [
        (["strategies"], []),
        (["--help"], []),
        (["train", "--help"], []),
        (["train", "-c", "run.yaml", "--nproc", "2"], ["pydantic"]),  # which looks at the path
    ],
)
def test_the_cli_starts_without_torch(arguments: list[str], imported: list[str]) -> None:
    """So does a launcher, for whose imports its ranks would wait."""
    code = (
        "import sys; from specforge_core import cli; from specforge_core.train import launch\n"
        "launch.launch = lambda nproc, given: 0  # ranks do import it\n"
        f"sys.argv = ['specforge', *{arguments!r}]\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(imported)


def test_no_file_holds_what_a_merge_left() -> None:
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    found = [
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.md", "*.sh", "*.toml", "*.yaml")
        for path in ROOT.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        if any(line.startswith(marks) for line in path.read_text().splitlines())
    ]
    assert found == []
