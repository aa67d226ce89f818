"""Calls of hooks: errors and wrong answers name the package, the hook, and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from . import blame, plugins
from .errors import PluginError, SpecForgeError
from .returned import Wrong
from .stop import Interrupted
from .text import cut, said
from .watch import Watch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Calls:
    """The plugin manager of one run, behind calls that check what comes back."""

    name: str  # of the strategy
    package: str  # its distribution's name and version
    pm: plugins.Manager

    @contextmanager
    def guard(
        self, hook: str, plugin: str | None = None, *, status: int = 1, package: str | None = None
    ) -> Iterator[None]:
        """Turn what a plugin raises, in a hook or in what the hook returned, into a PluginError.

        `status` is the command's exit status then: 1 in a run, 2 where it is set up.  `package` is
        named, where that is known; else the one whose code the error came through.
        """
        try:
            yield
        except (SpecForgeError, MemoryError, KeyboardInterrupt, GeneratorExit, Interrupted):
            raise
        except BaseException as exc:
            if _out_of_memory(exc):
                raise
            who = package or blame.blamed(self.pm, hook, exc, plugin or self.name)
            reason = cut(said(exc), plugins.REASON)
            error = PluginError(f"{who}, {hook}: {type(exc).__name__}: {reason}")
            error.exit_code = status
            raise error from exc

    def check_returned(self, hook: str, value: object, kind: type[T]) -> T:
        """Return what a plugin returned; PluginError if it is of another type."""
        if not isinstance(value, kind):
            raise self._unexpected(hook, value, kind.__name__)
        return value

    def check(
        self, hook: str, wrong: Wrong | None, *, value: object = None, package: str | None = None
    ) -> None:
        """Raise PluginError where something is wrong with what `value` is, or has returned."""
        if wrong is not None:
            who = package or blame.package_behind(self.pm, hook, value, self.name)
            raise PluginError(f"{who}, {hook}: returned {wrong[0]}, expected {wrong[1]}")

    def watched(self, hook: str, value: Any, kind: Callable[[Any, Watch], Any]) -> Any:
        """Return a plugin's object so that what goes wrong in it names its package and hook."""
        if any(one.__module__.partition(".")[0] == __package__ for one in type(value).__mro__):
            return value  # the core's own, or of its kind, which it knows more of
        who = blame.package_behind(self.pm, hook, value, self.name)
        guard = partial(self.guard, hook, package=who)
        return kind(value, Watch(guard, partial(self.check, hook, package=who)))

    def _first(self, hook: str, **arguments: object) -> Any:
        with self.guard(hook, status=2):
            return getattr(self.pm.hook, hook)(**arguments)

    def _need(self, hook: str, **arguments: object) -> Any:
        found = self._first(hook, **arguments)
        if found is None:
            raise PluginError(
                f"{self.package}, {hook}: returned nothing. Its package has to return what "
                "specforge_core/hookspecs.py says"
            )
        return found

    def _with(self, hook: str, value: T, *names: str) -> T:
        with self.guard(hook, status=2):  # a property may raise
            missing = [name for name in names if not hasattr(value, name)]
        if missing:
            wanted = "a function" if names == ("__call__",) else f"an object with {missing[0]!r}"
            raise self._unexpected(hook, value, wanted)
        return value

    def _unexpected(
        self, hook: str, value: object, expected: str, plugin: str | None = None
    ) -> PluginError:
        who = blame.package_behind(self.pm, hook, value, plugin or self.name)
        return PluginError(f"{who}, {hook}: returned {type(value).__name__}, expected {expected}")


def _out_of_memory(exc: BaseException) -> bool:
    return type(exc).__name__ == "OutOfMemoryError"
