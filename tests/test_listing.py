"""`specforge plugins` and `specforge check`, through real metadata."""

from __future__ import annotations

import json
import os
import sys

import pytest

from specforge_core.cli import cli
from specforge_core.config import TrainConfig
from specforge_core.errors import ConfigError, PluginError
from specforge_core.listing import check, list_options, list_plugins
from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite

STRATEGY = """
from specforge_core import hookimpl
@hookimpl
def specforge_adapter(): ...
@hookimpl
def specforge_draft(): ...
@hookimpl
def specforge_train_step(): ...
"""
TRACKER = """
from pathlib import Path
from pydantic import Field
from specforge_core import hookimpl
from specforge_core.config import Section

class Options(Section):
    "Where numbers go."
    places: tuple[str, ...] = Field(("here",), description="Names of places.")

@hookimpl
def specforge_plugin_config(): return Options
@hookimpl
def specforge_tracker(run): ...
"""
COMMAND = """
import click
@click.command()
@click.option("--loud", is_flag=True, help="Shout.")
def command(loud): "Say something."
"""


def plugin(site: FakeSite, name: str, source: str, **options: object) -> None:
    module = f"acme_{name}"
    group = {"specforge.plugins": {name: module}}
    site.dist(f"acme-{name}", "0.3", group, module=module, source=source, **options)  # type: ignore[arg-type]


def command(site: FakeSite, name: str, source: str = COMMAND) -> None:
    module = f"acme_{name}"
    group = {"specforge.commands": {name: f"{module}:command"}}
    site.dist(f"acme-{name}", "0.3", group, module=module, source=source)


def states(group: str) -> dict[str, tuple[str, str]]:
    rows = list_plugins(cli)
    return {r["name"]: (r["state"], r["reason"]) for r in rows if r["group"] == group}


def test_every_state_of_a_plugin_is_told_with_its_reason(
    env: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(env, "plain", "")
    plugin(env, "tracker", TRACKER)
    plugin(env, "silenced", "1 / 0")
    plugin(env, "raises", "1 / 0")
    plugin(env, "leaves", "import sys; sys.exit(0)")
    plugin(env, "typo", TRACKER + "\n@hookimpl\ndef specforge_colate(config): ...\n")
    plugin(env, "future", "", requires=["specforge-core>=99"])
    plugin(env, "unreadable", "", requires=["specforge-core>=nonsense"])
    plugin(env, "other", "", requires=["some thing nobody can read ;;"])
    env.dist("acme-gone", "1", {"specforge.plugins": {"gone": "acme_gone"}})
    env.dist("other-plain2", "1", {"specforge.plugins": {"twice": "acme_plain"}})
    env.dist("acme-plain2", "1", {"specforge.plugins": {"twice": "acme_plain"}})
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", "silenced")
    found = states("plugins")
    assert found["plain"] == ("ok", "")
    assert found["tracker"] == (
        "off",
        "takes part only in runs with a section plugins.tracker",
    )
    assert found["silenced"] == ("disabled", "SPECFORGE_DISABLE_PLUGINS names it (silenced)")
    assert found["raises"][0] == "broken"
    assert "ZeroDivisionError" in found["raises"][1]
    assert found["leaves"][0] == "broken"
    assert "SystemExit: 0" in found["leaves"][1]
    assert found["typo"][0] == "broken"
    assert "did you mean specforge_collate?" in found["typo"][1]
    assert found["future"][0] == "incompatible"
    assert found["unreadable"][0] == "incompatible"
    assert "which is no version" in found["unreadable"][1]
    assert found["other"] == ("ok", "")
    assert found["gone"][0] == "broken"
    assert "there is no module 'acme_gone'" in found["gone"][1]
    assert found["twice"][0] == "duplicate"


def test_strategies_and_commands_are_listed_without_an_import(env: FakeSite) -> None:
    env.strategy("good", "1 / 0")
    command(env, "speak", "1 / 0")
    command(env, "train", "1 / 0")
    assert states("strategies")["good"] == ("ok", "")  # only an import could tell
    assert states("commands")["speak"] == ("ok", "")
    assert states("commands")["train"][0] == "duplicate"
    assert {"specforge_good", "acme_speak"}.isdisjoint(sys.modules)


def test_the_command_prints_json_and_a_table(env: FakeSite) -> None:
    plugin(env, "tracker", TRACKER)

    def ask(*arguments: str) -> str:
        done = run("plugins", *arguments, env=os.environ | {"PYTHONPATH": str(env.path)})
        assert done.returncode == 0
        return done.stdout

    rows = [row for row in json.loads(ask("--json")) if row["name"] == "tracker"]
    assert rows == [
        {
            "group": "plugins",
            "name": "tracker",
            "package": "acme-tracker",
            "version": "0.3",
            "state": "off",
            "reason": "takes part only in runs with a section plugins.tracker",
        }
    ]
    (line,) = (line for line in ask().splitlines() if " tracker " in line)
    assert line.split()[:4] == ["plugins", "tracker", "acme-tracker", "0.3"]
    assert line.endswith("off: takes part only in runs with a section plugins.tracker")


def test_check_prints_a_plugin_s_hooks_and_its_section(env: FakeSite) -> None:
    plugin(env, "tracker", TRACKER)
    lines = list(check("tracker"))
    assert lines == [
        "tracker: ok (plugin of acme-tracker 0.3)",
        "hooks: specforge_plugin_config, specforge_tracker",
        "off unless a run has the section plugins.tracker (plugins.tracker={})",
        "options of plugins.tracker: (Where numbers go.)",
        "  places: tuple[str, ...] = ('here',)  Names of places.",
    ]


def test_check_prints_a_command_s_help(env: FakeSite) -> None:
    command(env, "speak")
    lines = list(check("speak"))
    assert lines[0] == "speak: ok (command of acme-speak 0.3)"
    assert "specforge speak [OPTIONS]" in lines[1]
    assert "Shout." in lines[1]


def test_check_of_one_name_in_two_groups_checks_both(env: FakeSite) -> None:
    env.strategy("speak", STRATEGY)
    command(env, "speak")
    lines = list(check("speak"))
    assert lines[0] == "speak: ok (specforge-speak 0.1.0)"
    assert "speak: ok (command of acme-speak 0.3)" in lines


@pytest.mark.parametrize("name", ["trackr", "spek", "goood"])
def test_a_misspelled_name_gets_the_one_that_was_meant(env: FakeSite, name: str) -> None:
    plugin(env, "tracker", TRACKER)
    command(env, "speak")
    env.strategy("good", STRATEGY)
    meant = {"trackr": "tracker", "spek": "speak", "goood": "good"}[name]
    with pytest.raises(PluginError, match=f"did you mean '{meant}'"):
        list(check(name))


def test_check_refuses_what_a_run_would(env: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(env, "leaves", "import sys; sys.exit(0)")
    plugin(
        env,
        "lax",
        "from specforge_core import hookimpl\n@hookimpl\ndef specforge_tracker(run=None): ...",
    )
    plugin(env, "silenced", TRACKER)
    command(env, "wrong", "command = 3")
    with pytest.raises(PluginError, match="SystemExit: 0"):
        list(check("leaves"))
    with pytest.raises(PluginError, match="specforge_tracker gives a default to run"):
        list(check("lax"))
    with pytest.raises(PluginError, match="'acme_wrong:command' holds int"):
        list(check("wrong"))
    monkeypatch.setenv("SPECFORGE_DISABLE_PLUGINS", "silenced")
    with pytest.raises(PluginError, match="Try: unset SPECFORGE_DISABLE_PLUGINS"):
        list(check("silenced"))


def test_a_plugin_that_leaves_at_import_fails_the_command(env: FakeSite) -> None:
    plugin(env, "leaves", "import sys; sys.exit(0)")
    done = run("check", "leaves", env=os.environ | {"PYTHONPATH": str(env.path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: leaves (acme-leaves 0.3) could not be imported")
    assert done.stdout == ""


def test_config_prints_every_option_of_a_section_or_of_all() -> None:
    lines = list(list_options("train"))
    assert lines[0] == "options of train: (The optimizer, its schedule, and when to save.)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(TrainConfig.model_fields)
    assert "  batch_size: int = 1  Samples per micro-batch and rank." in lines
    everything = list(list_options(None))
    assert set(lines) < set(everything)
    assert any(line.startswith("  path: ") and "= required" in line for line in everything)
    with pytest.raises(ConfigError, match="'trian' is no section of the core's"):
        list(list_options("trian"))
