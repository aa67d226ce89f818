"""`specforge check`: its arguments, and the suite of every strategy, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, PluginError, RunError
from .load import apply_override, validate
from .plugins import find_strategy

if TYPE_CHECKING:
    from .config import RunConfig
    from .strategy import Strategy

SUITE = """
from specforge_core.testing.contract import StrategyContract

class TestContract(StrategyContract):
    strategy = {options!r}
"""


def run_of(name: str, overrides: tuple[str, ...]) -> tuple[RunConfig, Strategy]:
    """Return the run that overrides alone describe: of a strategy, on a target."""
    return validate(_raw(name, overrides), "the command line")


def _raw(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    raw: dict[str, Any] = {"strategy": {"name": name}}
    for override in overrides:
        apply_override(raw, override)
    return raw


def _check_fits(raw: dict[str, Any], directory: Path) -> None:
    """Raise ConfigError when the options do not fit the toy target that the suite is run on."""
    from .target.info import load_target_info
    from .testing.toy import save_toy_target

    save_toy_target(target := directory / "toy")
    run, strategy = validate({**raw, "target": {"path": str(target)}}, "the command line")
    info = load_target_info(run.target)
    try:
        strategy.adapter(run.strategy, info)
        strategy.draft(run.strategy, info, None)
    except PluginError:
        pass  # a fault of the strategy, which the suite shows
    except ConfigError as exc:
        raise ConfigError(f"on the suite's toy target: {exc}") from exc


def check_deep(name: str, overrides: tuple[str, ...]) -> None:
    """Run `specforge_core.testing.contract` on a strategy.

    Raises PluginError when pytest is missing, ConfigError when the options do not fit the toy
    target, RunError when the strategy fails.
    """
    find_strategy(name)
    if find_spec("pytest") is None:
        raise PluginError("the suite is run by pytest, which is missing. Try: pip install pytest")
    raw = _raw(name, overrides)
    validate({"target": {"path": "toy"}, **raw}, "the command line")  # before a minute of tests
    with tempfile.TemporaryDirectory(prefix="specforge-check-") as directory:
        _check_fits(raw, Path(directory))
        file = Path(directory) / "test_contract.py"
        file.write_text(SUITE.format(options=raw["strategy"]), encoding="utf-8")
        options = ("-q", "--rootdir", directory, "-c", "/dev/null", "-p", "no:cacheprovider")
        markers = ("-o", "markers=slow: starts processes")
        command = [sys.executable, "-m", "pytest", *options, *markers, str(file)]
        if subprocess.run(command, check=False).returncode:
            raise RunError(
                f"strategy {name!r} does not pass the suite of every strategy: see above. Try: "
                "a test class of your own, specforge_core.testing.contract.StrategyContract"
            )
