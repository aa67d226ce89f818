"""What is installed: the rows of `specforge strategies`, the report of `specforge check`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.util import find_spec

from .errors import PluginError
from .plugins import STRATEGIES, Installed, discover


def list_strategies() -> list[dict[str, str]]:
    """Return name, package, version and state of each installed strategy; imports none."""
    found = discover(STRATEGIES)
    return [
        {"name": s.name, "package": s.dist, "version": s.version, "state": _state(s)}
        for s in (found[name] for name in sorted(found))
    ]


def _state(installed: Installed) -> str:
    if problem := installed.problem():
        return f"{'duplicate' if installed.rivals else 'incompatible'}: {problem}"
    module = installed.entry_point.module
    if find_spec(module.partition(".")[0]) is None:
        return f"broken: there is no module {module!r}. Try: pip install {installed.dist}"
    return "ok"


def check_strategy(name: str) -> Iterator[str]:
    """Load one strategy as a run would; yield lines about its hooks and options.

    Raises PluginError for anything a run would trip over.
    """
    from pydantic_core import PydanticUndefined

    from .strategy import Strategy

    strategy = Strategy.load(name)
    plugin = strategy.pm.get_plugin(name)
    callers = strategy.pm.get_hookcallers(plugin) or []
    for caller in callers:
        for impl in caller.get_hookimpls():
            if impl.plugin is plugin and impl.kwargnames:
                # pluggy 1.6 never passes these, 1.7 does
                raise PluginError(
                    f"{name}: {caller.name} gives a default to {', '.join(impl.kwargnames)}. "
                    "A hook takes its arguments without defaults"
                )
    yield f"{name}: ok ({strategy.package})"
    yield f"hooks: {', '.join(sorted(caller.name for caller in callers))}"
    model = strategy.config()
    doc = inspect.getdoc(model) or ""
    yield f"options of strategy: ({doc.splitlines()[0] if doc else model.__name__})"
    for option, field in model.model_fields.items():
        default = "required" if field.default is PydanticUndefined else repr(field.default)
        kind = inspect.formatannotation(field.annotation)
        yield f"  {option}: {kind} = {default}  {field.description or ''}".rstrip()
