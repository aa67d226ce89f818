"""Which package something that went wrong in a plugin belongs to."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType

import pluggy

from .packages import version
from .plugins import CORE, PLUGINS, STRATEGIES, Manager, discover


def package_of(pm: Manager, name: str) -> str:
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


def package_behind(pm: Manager, hook: str, value: object, strategy: str) -> str:
    """Return the package that a value of a hook comes from: whose module defines it or its type."""
    code = getattr(value, "gi_code", None)  # of a hook that is a generator
    for impl in getattr(pm.hook, hook).get_hookimpls():
        if code is not None and _code(impl) is code:
            return package_of(pm, impl.plugin_name)
    own = vars(value).get("__module__") if isinstance(value, type | FunctionType) else None
    root = str(own or type(value).__module__).partition(".")[0]
    for name, plugin in pm.list_name_plugin():
        # a plugin may return a type of the core's
        if name != "core" and getattr(plugin, "__name__", "").partition(".")[0] == root:
            return package_of(pm, name)
    return provider(pm, hook, strategy)


def provider(pm: Manager, hook: str, strategy: str) -> str:
    """Return the package whose implementation of a hook answered, or else came first."""
    if (name := pm.answered.get(hook)) is not None:
        return package_of(pm, name)
    names = [impl.plugin_name for impl in reversed(getattr(pm.hook, hook).get_hookimpls())]
    if strategy in names:
        return package_of(pm, strategy)
    return package_of(pm, names[0]) if names else package_of(pm, strategy)


def blamed(pm: Manager, hook: str, exc: BaseException, default: str) -> str:
    """Return the package whose implementation an exception came through."""
    codes = set()
    trace = exc.__traceback__
    while trace is not None:
        codes.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    for impl in reversed(getattr(pm.hook, hook).get_hookimpls()):
        if _code(impl) in codes:
            return package_of(pm, impl.plugin_name)
    return package_of(pm, default)


def _code(impl: pluggy.HookImpl) -> CodeType | None:
    return getattr(inspect.unwrap(impl.function), "__code__", None)
