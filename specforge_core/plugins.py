"""Find installed plugins, and build the plugin manager of one run.

Discovery reads entry-point metadata and imports nothing.  A strategy's module
is imported only when a run names it, so a broken or slow plugin costs nothing
to everyone else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version

import pluggy

from . import hookspecs
from .errors import PluginError

CORE = "specforge-core"
STRATEGIES = "specforge.strategies"
PLUGINS = "specforge.plugins"
DISABLE_ENV = "SPECFORGE_DISABLE_PLUGINS"
REQUIRED = ("specforge_adapter", "specforge_draft", "specforge_train_step")


@dataclass(frozen=True, slots=True)
class Installed:
    """One entry point, as its distribution declares it.  Nothing is imported."""

    name: str
    dist: str
    version: str
    entry_point: EntryPoint
    needs: str | None = None  # the version of the core it asks for
    rivals: tuple[str, ...] = ()  # other packages that claim the same name

    def __str__(self) -> str:
        return f"{self.name} ({self.dist} {self.version})"

    def problem(self) -> str | None:
        """Say why this plugin cannot be loaded, as far as metadata tells."""
        if self.rivals:
            packages = ", ".join((f"{self.dist} {self.version}", *self.rivals))
            return (
                f"{len(self.rivals) + 1} packages provide {self.name!r}: {packages}. "
                f"Uninstall all but one: pip uninstall {self.dist}"
            )
        if self.needs is not None:
            from packaging.specifiers import SpecifierSet  # only when a plugin pins us

            have = version(CORE)
            if not SpecifierSet(self.needs).contains(have, prereleases=True):
                return (
                    f"{self} needs {CORE}{self.needs}, but {have} is installed. "
                    f"Try: pip install -U {self.dist} {CORE}"
                )
        return None


def discover(group: str) -> dict[str, Installed]:
    """Return the installed entry points of `group` by name."""
    found: dict[str, Installed] = {}
    for ep in entry_points(group=group):
        assert ep.dist is not None  # always set by entry_points()
        new = Installed(ep.name, ep.dist.name, ep.dist.version, ep, _needs(ep.dist.requires))
        old = found.setdefault(ep.name, new)
        if old.dist != new.dist:
            rivals = (*old.rivals, f"{new.dist} {new.version}")
            found[ep.name] = Installed(
                old.name, old.dist, old.version, old.entry_point, old.needs, rivals
            )
    return found


def _needs(requires: Iterable[str] | None) -> str | None:
    if not any(r.lower().startswith(CORE) for r in requires or ()):
        return None
    from packaging.requirements import Requirement

    for text in requires or ():
        req = Requirement(text)
        if req.name.lower() == CORE and req.marker is None and str(req.specifier):
            return str(req.specifier)
    return None


def load(installed: Installed) -> object:
    """Import one plugin, turning any failure into a PluginError that names it."""
    if problem := installed.problem():
        raise PluginError(problem)
    try:
        return installed.entry_point.load()
    except Exception as exc:
        raise PluginError(
            f"{installed} could not be imported from {installed.entry_point.value!r}: "
            f"{type(exc).__name__}: {exc}. Try: pip install --force-reinstall {installed.dist}"
        ) from exc


def find_strategy(name: str) -> Installed:
    """Return the installed strategy `name`, or say what is installed instead."""
    installed = discover(STRATEGIES)
    if name in installed:
        return installed[name]
    have = ", ".join(sorted(installed)) or "none"
    raise PluginError(
        f"strategy {name!r} is not installed (installed: {have}). Try: pip install specforge-{name}"
    )


def run_manager(name: str, *, disable: Iterable[str] = ()) -> pluggy.PluginManager:
    """Build the plugin manager of one run: core, cross-cutting plugins, one strategy."""
    strategy = find_strategy(name)
    pm = core_manager(disable=disable)
    _register(pm, strategy)
    try:
        pm.check_pending()
    except pluggy.PluginValidationError as exc:
        raise PluginError(
            f"{strategy} does not fit the hook specs: {exc}. "
            f"Try: pip install -U {strategy.dist} {CORE}"
        ) from exc
    missing = [h for h in REQUIRED if not getattr(pm.hook, h).get_hookimpls()]
    if missing:
        raise PluginError(
            f"{strategy} does not implement {', '.join(missing)}. "
            f"Try: pip install -U {strategy.dist}"
        )
    return pm


def core_manager(*, disable: Iterable[str] = ()) -> pluggy.PluginManager:
    """Build a manager of the core's defaults and the cross-cutting plugins, no strategy."""
    from . import defaults

    pm = pluggy.PluginManager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs)
    pm.register(defaults, "core")
    disabled = {*disable, *os.environ.get(DISABLE_ENV, "").split(",")}
    for plugin in discover(PLUGINS).values():
        if plugin.name not in disabled:
            _register(pm, plugin)
    return pm


def _register(pm: pluggy.PluginManager, installed: Installed) -> None:
    try:
        pm.register(load(installed), installed.name)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginError(f"{installed} does not fit the hook specs: {exc}") from exc
