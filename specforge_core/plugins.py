"""Find installed plugins, and build the plugin manager of one run.

Discovery reads entry-point metadata and imports nothing.  A strategy's module
is imported only when a run names it, so a broken or slow plugin costs nothing
to everyone else.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points, version

import pluggy

from . import hookspecs
from .errors import PluginError
from .text import cut, shorten

CORE = "specforge-core"
STRATEGIES = "specforge.strategies"
PLUGINS = "specforge.plugins"
COMMANDS = "specforge.commands"
DEFAULT_PLUGINS = ("specforge_core.defaults",)
DISABLE_ENV = "SPECFORGE_DISABLE_PLUGINS"
OWN_SECTION = "specforge_plugin_config"
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
            # only when a plugin pins us
            from packaging.specifiers import InvalidSpecifier, SpecifierSet

            have = version(CORE)
            try:
                allowed = SpecifierSet(self.needs)
            except InvalidSpecifier:
                return (
                    f"{self} says that it needs {CORE}{self.needs}, which is no version. "
                    f"Try: pip install -U {self.dist}"
                )
            if not allowed.contains(have, prereleases=True):
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
        needs = _needs(ep.dist.requires)
        new = Installed(ep.name, ep.dist.name, ep.dist.version, ep, needs)
        old = found.setdefault(ep.name, new)
        if old.dist != new.dist:
            rivals = (*old.rivals, f"{new.dist} {new.version}")
            found[ep.name] = replace(old, rivals=rivals)
    return found


def _needs(requires: Iterable[str] | None) -> str | None:
    """Return the versions of the core that a package asks for, as it spells them.

    Read by hand: parsing every requirement of every package would cost each start, and one that
    nobody can read must not break the others.
    """
    for text in requires or ():
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^]]*\])?\s*\(?([^;)]*)", text)
        if match is None or re.sub(r"[-_.]+", "-", match[1]).lower() != CORE:
            continue
        if ";" not in text and match[3].strip():
            return match[3].strip()
    return None


def load(installed: Installed) -> object:
    """Import one plugin, turning any failure into a PluginError that names it."""
    if problem := installed.problem():
        raise PluginError(problem)
    try:
        return installed.entry_point.load()
    except (Exception, SystemExit) as exc:
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
    close = difflib.get_close_matches(cut(name), installed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise PluginError(
        f"strategy {shorten(name)} is not installed (installed: {have}): {hint}"
        f"Try: pip install specforge-{cut(name)}"
    )


def run_manager(
    name: str, *, using: frozenset[str] = frozenset(), disable: Iterable[str] = ()
) -> pluggy.PluginManager:
    """Build the plugin manager of one run: core, cross-cutting plugins, one strategy.

    Plugins with a section of their own take part only if `using` names them.
    """
    strategy = find_strategy(name)
    pm = core_manager(using=using, disable=disable)
    _register(pm, strategy)
    missing = [h for h in REQUIRED if not implements(pm, name, h)]
    if missing:
        raise PluginError(
            f"{strategy} does not implement {', '.join(missing)}. "
            f"Try: pip install -U {strategy.dist}"
        )
    return pm


def core_manager(
    *, using: frozenset[str] = frozenset(), disable: Iterable[str] = ()
) -> pluggy.PluginManager:
    """Build a manager of the core's defaults and the cross-cutting plugins, no strategy."""
    pm = _Manager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs)
    for module in DEFAULT_PLUGINS:
        pm.register(importlib.import_module(module), "core")
    left_out = disabled() | frozenset(disable)
    for plugin in discover(PLUGINS).values():
        if plugin.name not in left_out:
            try:
                _register(pm, plugin)
            except PluginError as exc:
                other = f"Or leave it out: {DISABLE_ENV}={plugin.name}"
                raise PluginError(f"{exc}. {other}") from exc
            if plugin.name not in using and implements(pm, plugin.name, OWN_SECTION):
                pm.unregister(name=plugin.name)
    return pm


class _Manager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """Leave out another package's hook that a module imported under a name of its own."""
        given = getattr(getattr(plugin, name), "__name__", name)
        if given != name and given in vars(hookspecs):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def disabled() -> frozenset[str]:
    """Return the cross-cutting plugins that the environment leaves out."""
    return frozenset(os.environ.get(DISABLE_ENV, "").split(",")) - {""}


def implements(pm: pluggy.PluginManager, name: str, hook: str) -> bool:
    """Say whether a registered plugin has a hook."""
    return any(impl.plugin_name == name for impl in getattr(pm.hook, hook).get_hookimpls())


def _register(pm: pluggy.PluginManager, installed: Installed) -> None:
    module = load(installed)
    try:
        pm.register(module, installed.name)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginError(f"{installed} does not fit the hook specs: {exc}") from exc
    known = [hook for hook in vars(hookspecs) if hook.startswith(f"{hookspecs.PROJECT}_")]
    for caller in pm.get_hookcallers(module) or ():
        if caller.name not in known:
            close = difflib.get_close_matches(caller.name, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise PluginError(
                f"{installed} implements {caller.name}, which is no hook{hint} "
                "specforge_core/hookspecs.py lists them. "
                f"Try: pip install -U {installed.dist} {CORE}"
            )
        for impl in caller.get_hookimpls():
            if impl.plugin is module and impl.kwargnames:
                # pluggy 1.6 never passes these, 1.7 does
                raise PluginError(
                    f"{installed}: {caller.name} gives a default to {', '.join(impl.kwargnames)}. "
                    "A hook takes its arguments without defaults"
                )


# ---- whose fault it was ------------------------------------------------------


def package_of(pm: pluggy.PluginManager, name: str) -> str:
    """Return the distribution and version behind a registered plugin's name."""
    if name == "core":
        return f"{CORE} {version(CORE)}"
    plugin = pm.get_plugin(name)
    for group in (STRATEGIES, PLUGINS):
        found = discover(group).get(name)
        if found is not None and found.entry_point.value.partition(":")[0] == getattr(
            plugin, "__name__", None
        ):
            return f"{found.dist} {found.version}"
    return name


def package_behind(pm: pluggy.PluginManager, value: object) -> str:
    """Return the package whose module defines a value's type; that module, if none does."""
    module = type(value).__module__
    for name, plugin in pm.list_name_plugin():
        root = getattr(plugin, "__name__", "").partition(".")[0]
        if root == module.partition(".")[0]:
            return package_of(pm, name)
    return module


def provider(pm: pluggy.PluginManager, hook: str, strategy: str) -> str:
    """Return the package whose implementation of a hook came first."""
    names = [impl.plugin_name for impl in reversed(getattr(pm.hook, hook).get_hookimpls())]
    if strategy in names:
        return package_of(pm, strategy)
    return package_of(pm, names[0]) if names else package_of(pm, strategy)


def blamed(pm: pluggy.PluginManager, hook: str, exc: BaseException, default: str) -> str:
    """Return the package whose implementation an exception came through."""
    codes = set()
    trace = exc.__traceback__
    while trace is not None:
        codes.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    for impl in reversed(getattr(pm.hook, hook).get_hookimpls()):
        if getattr(impl.function, "__code__", None) in codes:
            return package_of(pm, impl.plugin_name)
    return package_of(pm, default)
