"""Commands of packages: listed by metadata, imported when called, broken alone."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite

HELLO = """
import click, sys, pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()
from specforge_core.errors import RunError

@click.command()
@click.option("--how", default="well", help="What to do.")
@click.pass_context
def command(ctx, how):
    '''Greet somebody.'''
    if how == "exit":
        ctx.exit(7)
    if how == "sys":
        sys.exit("it is over")
    if how == "refuse":
        raise RunError("it does not work. Try: --how well")
    if how == "bug":
        {}["x"]
    click.echo("hello")
    return 5
"""


def specforge(site: FakeSite, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(*arguments, env=os.environ | {"PYTHONPATH": str(site.path)})


def add(site: FakeSite, name: str, source: str, **options: Any) -> None:
    module = f"acme_{name}"
    group = {"specforge.commands": {name: f"{module}:command"}}
    site.dist(f"acme-{name}", "0.3", group, module=module, source=source, **options)


@pytest.fixture
def site(env: FakeSite) -> FakeSite:
    add(env, "hello", HELLO, summary="Says hello.")
    return env


def test_help_lists_a_package_s_command_without_importing_it(site: FakeSite) -> None:
    add(site, "raises", "1 / 0", summary="Divides.")
    done = specforge(site, "--help")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["hello", "Says", "hello."] in lines
    assert ["raises", "Divides."] in lines
    assert lines.index(["hello", "Says", "hello."]) > [row[:1] for row in lines].index(["export"])
    assert not (site.path / "acme_hello.imported").exists()


def test_its_own_help_and_its_call_import_it(site: FakeSite) -> None:
    done = specforge(site, "hello", "--help")
    assert "Greet somebody." in done.stdout
    assert "What to do." in done.stdout
    done = specforge(site, "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    assert (site.path / "acme_hello.imported").exists()


def test_another_command_does_not_import_it(site: FakeSite) -> None:
    assert specforge(site, "strategies").returncode == 0
    assert not (site.path / "acme_hello.imported").exists()


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("exit", 7, ""),
        ("sys", 1, "error: it is over\n"),
        ("refuse", 1, "error: it does not work. Try: --how well\n"),
        ("bug", 1, "error: KeyError: 'x'\nAdd --debug to see where it came from\n"),
    ],
)
def test_errors_end_as_those_of_the_core(
    site: FakeSite, how: str, status: int, message: str
) -> None:
    done = specforge(site, "hello", "--how", how)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "raises (acme-raises 0.3) could not be imported from 'acme_raises:command'"),
        ("import sys; sys.exit(0)", "could not be imported from 'acme_raises:command': SystemExit"),
        ("def command(): ...", "'acme_raises:command' holds function, and an entry point of"),
        ("", "has no attribute 'command'"),
    ],
)
def test_a_broken_command_fails_alone(site: FakeSite, source: str, message: str) -> None:
    add(site, "raises", source)
    done = specforge(site, "raises")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert specforge(site, "hello").stdout == "hello\n"


def test_a_command_of_two_packages_or_another_core_is_refused_and_listed(site: FakeSite) -> None:
    add(site, "old", HELLO, requires=["specforge-core>=77"])
    site.dist("other-hello", "1", {"specforge.commands": {"hello": "acme_hello:command"}})
    lines = [line.split() for line in specforge(site, "--help").stdout.splitlines()]
    assert ["old", "Of", "the", "package", "acme_old."] in lines
    assert sum(line[:1] == ["hello"] for line in lines) == 1
    assert "needs specforge-core>=77" in specforge(site, "old").stderr
    assert "2 packages provide 'hello'" in specforge(site, "hello").stderr


def test_a_package_does_not_replace_a_command_of_the_core(site: FakeSite) -> None:
    add(site, "train", HELLO)
    done = specforge(site, "train", "--help")
    assert "Train a draft, offline or online; resumes." in done.stdout
    assert specforge(site, "--help").stdout.count("\n  train ") == 1
