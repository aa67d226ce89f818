"""Discovery and loading, always through real entry-point metadata."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from specforge_core import plugins
from specforge_core.config import StrategyConfig
from specforge_core.errors import PluginError
from specforge_core.listing import check_strategy, list_strategies
from specforge_core.strategy import Strategy
from specforge_core.testing.plugin import FakeSite

GOOD = """
from specforge_core import hookimpl
from specforge_core.config import StrategyConfig
from specforge_core.types import CaptureSpec
class GoodConfig(StrategyConfig):
    block_size: int = 16
@hookimpl
def specforge_config(): return GoodConfig
class Adapter:
    spec = CaptureSpec(layers=(7,), fields={})
    def __call__(self, capture): ...
@hookimpl
def specforge_adapter(config, target): return Adapter()
@hookimpl
def specforge_draft(config): return "draft"
@hookimpl
def specforge_train_step(config): return lambda: "NAME-step"
"""


def step_of(strategy: Strategy) -> object:
    step: Any = strategy.train_step(StrategyConfig(name="x"))
    return step()


def states() -> dict[str, str]:
    return {row["name"]: row["state"] for row in list_strategies()}


def test_listing_imports_nothing_and_survives_a_broken_plugin(env: FakeSite) -> None:
    env.strategy("good", GOOD)
    env.strategy("raises", "1 / 0")
    env.dist("specforge-gone", "1.0", {"specforge.strategies": {"gone": "specforge_gone"}})
    found = states()
    assert found["good"] == "ok"
    assert found["raises"] == "ok"  # only an import could tell
    assert "there is no module 'specforge_gone'" in found["gone"]
    assert "specforge_good" not in sys.modules
    assert "specforge_raises" not in sys.modules


def test_a_module_that_fails_to_import_breaks_only_its_own_run(env: FakeSite) -> None:
    env.strategy("good", GOOD)
    env.strategy("raises", "1 / 0")
    assert step_of(Strategy.load("good")) == "NAME-step"
    with pytest.raises(PluginError) as error:
        Strategy.load("raises")
    assert "raises (specforge-raises 0.1.0) could not be imported from 'specforge_raises'" in str(
        error.value
    )
    assert "ZeroDivisionError" in str(error.value)


def test_only_the_chosen_strategy_is_imported(env: FakeSite) -> None:
    env.strategy("one", GOOD)
    env.strategy("two", GOOD)
    Strategy.load("two")
    assert "specforge_one" not in sys.modules


def test_two_runs_in_one_process_do_not_mix(env: FakeSite) -> None:
    env.strategy("one", GOOD.replace("NAME", "one"))
    env.strategy("two", GOOD.replace("NAME", "two"))
    a, b = Strategy.load("one"), Strategy.load("two")
    steps = [step_of(s) for s in (a, b, a)]
    assert steps == ["one-step", "two-step", "one-step"]


def test_a_missing_strategy_says_what_is_installed(env: FakeSite) -> None:
    env.strategy("good", GOOD)
    with pytest.raises(PluginError) as error:
        Strategy.load("absent")
    assert "strategy 'absent' is not installed" in str(error.value)
    assert "good" in str(error.value)
    assert "pip install specforge-absent" in str(error.value)
    with pytest.raises(PluginError, match=r"did you mean 'good'\? Try: strategy.name=good$"):
        Strategy.load("goood")


def test_two_packages_with_one_name_break_only_that_name(env: FakeSite) -> None:
    env.strategy("good", GOOD)
    env.strategy("twice", GOOD)
    env.dist("acme-twice", "2.0", {"specforge.strategies": {"twice": "acme"}})
    assert states()["good"] == "ok"
    assert states()["twice"].startswith("duplicate: 2 packages provide 'twice'")
    Strategy.load("good")
    with pytest.raises(PluginError, match=r"acme-twice 2\.0.*Uninstall all but one"):
        Strategy.load("twice")


def test_a_misspelled_hook_is_named(env: FakeSite) -> None:
    env.strategy("typo", GOOD + "\n@hookimpl\ndef specforge_colate(config): ...\n")
    with pytest.raises(
        PluginError, match="specforge_colate, which is no hook, did you mean specforge_coll"
    ):
        Strategy.load("typo")


def test_a_wrong_argument_is_named(env: FakeSite) -> None:
    env.strategy("args", GOOD.replace("specforge_draft(config)", "specforge_draft(cfg)"))
    with pytest.raises(PluginError, match="does not fit the hook specs") as error:
        Strategy.load("args")
    assert "'cfg'" in str(error.value)


def test_a_missing_required_hook_is_named(env: FakeSite) -> None:
    source = GOOD.replace('@hookimpl\ndef specforge_draft(config): return "draft"', "")
    env.strategy("partly", source)
    with pytest.raises(PluginError, match="does not implement specforge_draft"):
        Strategy.load("partly")


@pytest.mark.parametrize("hook", ["draft(config)", "proposer(config)"])  # one that is required
def test_a_hook_without_its_marker_is_named(env: FakeSite, hook: str) -> None:
    source = GOOD.replace('@hookimpl\ndef specforge_draft(config): return "draft"', "")
    env.strategy("bare", (source if "draft" in hook else GOOD) + f"\ndef specforge_{hook}: ...\n")
    name = hook.partition("(")[0]
    with pytest.raises(PluginError, match=rf"specforge_{name} has the name .* Put @hookimpl above"):
        Strategy.load("bare")


def test_a_plugin_that_pins_another_core_is_incompatible(env: FakeSite) -> None:
    env.strategy("old", GOOD, requires=["specforge-core>=7,<8"])
    assert states()["old"].startswith("incompatible: old (specforge-old 0.1.0) needs")
    with pytest.raises(PluginError, match=r"needs specforge-core>=7,<8, but 0\.2"):
        Strategy.load("old")


OURS = "[specforge.strategies]\nbroken = specforge_broken\n"
NAMED = "Metadata-Version: 2.1\nName: specforge-broken\nVersion: 0.1.0\n"
ABSENT = "there is no module 'specforge_broken'"


@pytest.mark.parametrize(
    ("metadata", "entries", "state"),
    [
        (
            None,
            OURS,
            "broken: the package that provides 'broken' ('specforge_broken') has",
        ),
        ("", OURS, "it has no name or no version"),
        ("Name: specforge-broken\n", OURS, "it has no name or no version"),
        (f"{NAMED}Summary: \udcff\n", OURS, "UnicodeDecodeError: 'utf-8' codec can't decode"),
        (NAMED, OURS.replace("specforge_broken", "!!!"), "'!!!' names no module"),
        (NAMED, OURS.replace("specforge_broken", ""), "'' names no module"),
        (NAMED, OURS.replace("specforge_broken", ".x"), "broken: there is no module '.x'"),
        (NAMED, "[specforge.strategies]\nbroken\n", None),
        (NAMED, "[specforge.strategies]\n\udcff = x\n", None),
        (f"{NAMED}Requires-Dist: specforge-core>=banana\n", OURS, "which is no version"),
        (f"{NAMED}Requires-Dist: specforge_core>=99\n", OURS, "needs specforge-core>=99"),
        (f"{NAMED}Requires-Dist: SpecForge.Core (>=99)\n", OURS, "needs specforge-core>=99"),
        (f"{NAMED}Requires-Dist: specforge-core>=9; os_name != 'x'\n", OURS, "needs specforge-co"),
        (f"{NAMED}Requires-Dist: specforge-core>=9; extra == 'x'\n", OURS, ABSENT),
        (
            f"{NAMED}Requires-Dist: specforge-core>=0.1\nRequires-Dist: specforge-core<0.2\n",
            OURS,
            "needs specforge-core>=0.1,<0.2",
        ),
        (f"{NAMED}Requires-Dist: specforge-core @ file:///x\n", OURS, ABSENT),
    ],
)
def test_broken_metadata_breaks_its_own_package_only(
    env: FakeSite, metadata: str | None, entries: str, state: str | None
) -> None:
    env.strategy("good", GOOD.replace("NAME", "good"))
    info = env.path / "specforge_broken-0.1.0.dist-info"
    info.mkdir()
    for name, text in (("METADATA", metadata), ("entry_points.txt", entries)):
        if text is not None:
            (info / name).write_bytes(text.encode(errors="surrogateescape"))
    found = states()
    assert found["good"] == "ok"
    assert ("broken" in found) == (state is not None)
    assert (state or "") in found.get("broken", "")
    with pytest.raises(PluginError):
        Strategy.load("broken")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit: "),
        ("raise GeneratorExit", "GeneratorExit: "),
        ("class Mine(BaseException): ...\nraise Mine('x')", "Mine: x"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth"),
        ("raise ValueError('x' * 10**6)", "x... (1000000 characters)"),
        ("\0", "null bytes"),
    ],
)
def test_whatever_ends_an_import_is_an_error_of_the_package(
    env: FakeSite, source: str, kind: str
) -> None:
    env.strategy("ends", source)
    with pytest.raises(PluginError, match="could not be imported from 'specforge_ends'") as error:
        Strategy.load("ends")
    assert kind in str(error.value)
    assert len(str(error.value)) < 1000
    with pytest.raises(PluginError, match="could not be imported from 'specforge_ends'"):
        list(check_strategy("ends"))


def test_a_cross_cutting_plugin_wraps_a_strategy_hook_and_can_be_disabled(
    env: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.strategy("good", GOOD.replace("NAME", "good"))
    source = """
    from specforge_core import hookimpl
    @hookimpl(wrapper=True)
    def specforge_train_step(config):
        step = yield
        return lambda: f"timed({step()})"
    """
    group = {"specforge.plugins": {"timing": "specforge_timing"}}
    env.dist("specforge-timing", "0.1", group, module="specforge_timing", source=source)
    assert step_of(Strategy.load("good")) == "timed(good-step)"
    monkeypatch.setenv(plugins.DISABLE_ENV, "timing")
    assert step_of(Strategy.load("good")) == "good-step"


def test_a_strategy_inherits_hooks_by_importing_them(env: FakeSite) -> None:
    env.strategy("base", GOOD.replace("NAME", "base"))
    env.strategy(
        "child",
        """
        from specforge_base import specforge_adapter, specforge_config, specforge_draft
        from specforge_core import hookimpl
        @hookimpl
        def specforge_train_step(config): return lambda: "child-step"
        """,
    )
    child = Strategy.load("child")
    assert step_of(child) == "child-step"
    target: Any = SimpleNamespace(num_layers=8)
    adapter: Any = child.adapter(None, target)  # type: ignore[arg-type]
    assert adapter.spec.layers == (7,)


def test_check_refuses_a_default_in_a_hook(env: FakeSite) -> None:
    env.strategy("lax", GOOD.replace("specforge_draft(config)", "specforge_draft(config=None)"))
    with pytest.raises(PluginError, match="specforge_draft gives a default to config"):
        list(check_strategy("lax"))


def test_check_prints_hooks_and_options(env: FakeSite) -> None:
    env.strategy("good", GOOD)
    text = "\n".join(check_strategy("good"))
    assert "good: ok (specforge-good 0.1.0)" in text
    assert "specforge_train_step" in text
    assert "block_size: int = 16" in text


def test_an_unknown_target_engine_names_the_package_to_install(env: FakeSite) -> None:
    from specforge_core.config import TargetConfig

    env.strategy("good", GOOD)
    with pytest.raises(PluginError, match=r"target\.engine 'warp' is not provided"):
        Strategy.load("good").target_engine(TargetConfig(path="x", engine="warp"), None)  # type: ignore[arg-type]
