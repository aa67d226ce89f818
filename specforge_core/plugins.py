"""Find installed plugins, and build the plugin manager of one run.

Discovery reads entry-point metadata and imports nothing.  A strategy's module
is imported only when a run names it, so a broken or slow plugin costs nothing
to everyone else.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint

import pluggy

from . import hookspecs
from .errors import PluginError
from .packages import Folders, declared, folders, version
from .text import cut, meant, said, shorten

CORE = "specforge-core"
STRATEGIES = "specforge.strategies"
PLUGINS = "specforge.plugins"
COMMANDS = "specforge.commands"
DEFAULT_PLUGINS = ("specforge_core.defaults",)
DISABLE_ENV = "SPECFORGE_DISABLE_PLUGINS"
REASON = 400  # characters shown of what another package raised
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
    unreadable: str | None = None  # what is wrong with its metadata

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
        if self.unreadable is not None:
            return (
                f"the package that provides {self.name!r} ({self.entry_point.value!r}) has "
                f"metadata that cannot be read: {self.unreadable}. Try: install it again"
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
    return dict(_discover(group, folders()))


@functools.lru_cache(maxsize=16)
def _discover(group: str, _: Folders) -> dict[str, Installed]:
    found: dict[str, Installed] = {}
    for ep in declared(group):
        new = _installed(ep)
        old = found.setdefault(ep.name, new)
        if old.dist != new.dist:
            rivals = (*old.rivals, f"{new.dist} {new.version}")
            found[ep.name] = replace(old, rivals=rivals)
    return found


def _installed(ep: EntryPoint) -> Installed:
    assert ep.dist is not None  # always set where metadata is read
    try:
        told = ep.dist.metadata  # which is parsed every time that it is asked for
        name, number = told["Name"], told["Version"]
        requires = told.get_all("Requires-Dist") or ep.dist.requires
    except Exception as exc:
        return Installed(ep.name, "?", "?", ep, unreadable=f"{type(exc).__name__}: {said(exc)}")
    if not (name and number):
        return Installed(ep.name, name or "?", "?", ep, unreadable="it has no name or no version")
    try:
        _ = ep.module
    except (AttributeError, ValueError):
        wrong = f"{ep.value!r} names no module"
        return Installed(ep.name, name, number, ep, unreadable=wrong)
    return Installed(ep.name, name, number, ep, _needs(requires))


def _needs(requires: Iterable[str] | None) -> str | None:
    """Return the versions of the core that a package asks for, as it spells them.

    Read by hand: parsing every requirement of every package would cost each start, and one that
    nobody can read must not break the others.
    """
    found = []
    for text in requires or ():
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^]]*\])?\s*\(?([^;)@]*)", text)
        if match is None or re.sub(r"[-_.]+", "-", match[1]).lower() != CORE:
            continue
        if match[3].strip() and _applies(text):
            found.append(match[3].strip())
    return ",".join(found) or None


def _applies(requirement: str) -> bool:
    if ";" not in requirement:
        return True
    from packaging.markers import Marker

    try:
        return Marker(requirement.partition(";")[2]).evaluate({"extra": ""})
    except ValueError:  # of every kind
        return True


def load(installed: Installed) -> object:
    """Import one plugin, turning any failure into a PluginError that names it."""
    if problem := installed.problem():
        raise PluginError(problem)
    try:
        return installed.entry_point.load()
    except KeyboardInterrupt:  # as it comes from a person, too
        raise
    except BaseException as exc:
        raise PluginError(
            f"{installed} could not be imported from {installed.entry_point.value!r}: "
            f"{type(exc).__name__}: {cut(said(exc), REASON)}. "
            f"Try: pip install --force-reinstall {installed.dist}"
        ) from exc


def find_strategy(name: str) -> Installed:
    """Return the installed strategy `name`, or say what is installed instead."""
    installed = discover(STRATEGIES)
    if name in installed:
        return installed[name]
    have = ", ".join(sorted(installed)) or "none"
    hint = meant(name, installed, "did you mean {0!r}? Try: strategy.name={0}")
    raise PluginError(f"strategy {shorten(name)} is not installed (installed: {have}): {hint}")


def run_manager(name: str, *, using: frozenset[str] = frozenset()) -> Manager:
    """Build the plugin manager of one run: core, cross-cutting plugins, one strategy.

    Plugins with a section of their own take part only if `using` names them.
    """
    strategy = find_strategy(name)
    pm = core_manager(using=using)
    _register(pm, strategy)
    missing = [h for h in REQUIRED if not implements(pm, name, h)]
    if missing:
        raise PluginError(
            f"{strategy} does not implement {', '.join(missing)}. "
            f"Try: pip install -U {strategy.dist}"
        )
    return pm


def core_manager(*, using: frozenset[str] = frozenset(), disable: Iterable[str] = ()) -> Manager:
    """Build a manager of the core's defaults and the cross-cutting plugins, no strategy."""
    pm = Manager(hookspecs.PROJECT)
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


class Manager(pluggy.PluginManager):
    """Remembers whose implementation answered last, of hooks that take the first answer."""

    def __init__(self, project_name: str) -> None:
        super().__init__(project_name)
        self.answered: dict[str, str] = {}  # hook -> name of the plugin

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """Register a plugin, and have its answers noted: pluggy does not tell whose it returns."""
        registered = super().register(plugin, name)
        for caller in self.get_hookcallers(plugin) or ():
            if caller.spec is None or not caller.spec.opts.get("firstresult"):
                continue
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and not (impl.wrapper or impl.hookwrapper):
                    setattr(impl, "function", self._noting(caller.name, impl))  # noqa: B010
        return registered

    def _noting(self, hook: str, impl: pluggy.HookImpl) -> Callable[..., object]:
        inner, name = impl.function, impl.plugin_name

        @functools.wraps(inner)
        def call(*arguments: object) -> object:
            found = inner(*arguments)
            if found is not None:
                self.answered[hook] = name
            return found

        return call

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


def _unmarked(function: object) -> bool:
    return not hasattr(function, f"{hookspecs.PROJECT}_impl")  # pluggy's marker sets it


def _register(pm: pluggy.PluginManager, installed: Installed) -> None:
    module = load(installed)
    try:
        pm.register(module, installed.name)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginError(f"{installed} does not fit the hook specs: {exc}") from exc
    known = [hook for hook in vars(hookspecs) if hook.startswith(f"{hookspecs.PROJECT}_")]
    bare = [h for h in known if inspect.isroutine(f := getattr(module, h, None)) and _unmarked(f)]
    if bare:
        raise PluginError(
            f"{installed}: {', '.join(bare)} has the name of a hook and would never be called. "
            "Put @hookimpl above it (from specforge_core import hookimpl), or rename it"
        )
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
