"""Calls of hooks: errors and wrong answers name the package, the hook, and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy

from . import blame, plugins
from .errors import PluginError, SpecForgeError
from .stop import Interrupted
from .text import cut, said

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Calls:
    """The plugin manager of one run, behind calls that check what comes back."""

    name: str  # of the strategy
    package: str  # its distribution's name and version
    pm: pluggy.PluginManager

    @contextmanager
    def guard(self, hook: str, plugin: str | None = None, *, status: int = 1) -> Iterator[None]:
        """Turn what a plugin raises, in a hook or in what the hook returned, into a PluginError.

        `status` is the command's exit status then: 1 in a run, 2 where it is set up.
        """
        try:
            yield
        except (SpecForgeError, MemoryError, KeyboardInterrupt, GeneratorExit, Interrupted):
            raise
        except BaseException as exc:
            if _out_of_memory(exc):
                raise
            who = blame.blamed(self.pm, hook, exc, plugin or self.name)
            reason = cut(said(exc), plugins.REASON)
            error = PluginError(f"{who}, {hook}: {type(exc).__name__}: {reason}")
            error.exit_code = status
            raise error from exc

    def check_returned(self, hook: str, value: object, kind: type[T], text: str) -> T:
        """Return what a plugin's callable returned; PluginError if it is of another type."""
        if not isinstance(value, kind):
            raise self._unexpected(hook, value, text)
        return value

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

    def _typed(self, hook: str, value: object, kind: type[T]) -> T:
        return self.check_returned(hook, value, kind, f"{kind.__name__}")

    def _with(self, hook: str, value: T, *names: str) -> T:
        if missing := [name for name in names if not hasattr(value, name)]:
            wanted = "a function" if names == ("__call__",) else f"an object with {missing[0]!r}"
            raise self._unexpected(hook, value, wanted)
        return value

    def _unexpected(
        self, hook: str, value: object, expected: str, plugin: str | None = None
    ) -> PluginError:
        who = blame.provider(self.pm, hook, plugin or self.name)
        return PluginError(f"{who}, {hook}: returned {type(value).__name__}, expected {expected}")


def _out_of_memory(exc: BaseException) -> bool:
    return type(exc).__name__ == "OutOfMemoryError"
