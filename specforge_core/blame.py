"""Which package something that went wrong in a plugin belongs to."""

from __future__ import annotations

from importlib.metadata import version

import pluggy

from .plugins import CORE, PLUGINS, STRATEGIES, discover


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
