"""A plugin's object behind one that names its package in whatever goes wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakMethod

from .returned import (
    Wrong,
    wrong_capture,
    wrong_generated,
    wrong_proposal,
    wrong_tensors,
    wrong_type,
)
from .types import (
    CaptureSpec,
    Generated,
    GenerateOptions,
    GrowingReader,
    Prompt,
    Proposal,
    Sample,
    Sampling,
    TargetCapture,
    TargetInfo,
)

MISSING = object()


@dataclass(frozen=True, slots=True)
class Watch:
    """What is done about an object of a hook: both raise a PluginError that names its package."""

    guard: Callable[[], AbstractContextManager[None]]  # where its code raises
    check: Callable[[Wrong | None], None]  # where something is wrong with what it returned


class Watched:
    """Passes every call on."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self._inner, self._watch = inner, watch

    def __getattr__(self, name: str) -> Any:
        if name in ("_inner", "_watch"):  # a copy has none yet
            raise AttributeError(name)
        with self._watch.guard():
            found = getattr(self._inner, name, MISSING)
        if found is MISSING:
            raise AttributeError(f"{type(self._inner).__name__!r} has no attribute {name!r}")
        return _guarded(found, self._watch) if callable(found) else found

    def _each(
        self, method: Callable[[], Iterable[Any]], wrong: Callable[[object], Wrong | None]
    ) -> Iterator[Any]:
        """Yield what a method gives, one by one."""
        with self._watch.guard():
            found = method()
        self._watch.check(wrong_type(found, Iterable, "results to go through"))
        with self._watch.guard():
            for one in found:
                self._watch.check(wrong(one))
                yield one


class WatchedEngine(Watched):
    """A TargetEngine."""

    @property
    def info(self) -> TargetInfo:
        """What it says of its target."""
        with self._watch.guard():
            found: TargetInfo = self._inner.info
        self._watch.check(wrong_type(found, TargetInfo, "info of type TargetInfo"))
        return found

    def supports(self, spec: CaptureSpec) -> bool:
        """Say whether it can capture that."""
        with self._watch.guard():
            found: bool = self._inner.supports(spec)
        self._watch.check(wrong_type(found, bool, "True or False"))
        return found

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Yield a capture of each prompt."""
        return self._each(
            lambda: self._inner.capture(prompts, spec), lambda one: wrong_capture(one, spec)
        )

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Yield an answer to each prompt."""
        return self._each(lambda: self._inner.generate(prompts, options), wrong_generated)


class WatchedProposer(Watched):
    """A Proposer."""

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        """Draft tokens."""
        with self._watch.guard():
            found: Proposal = self._inner.propose(last_token, max_tokens, sampling)
        self._watch.check(wrong_proposal(found))
        return found


class WatchedReader(Watched):
    """A Reader."""

    def __len__(self) -> int:
        with self._watch.guard():
            return len(self._inner)

    def __getitem__(self, index: int) -> Sample:
        with self._watch.guard():
            found: Sample = self._inner[index]
        self._watch.check(wrong_tensors(found))
        return found


class WatchedGrowth(WatchedReader):
    """A GrowingReader; Python looks for the method in the class."""

    def refresh(self) -> bool:
        """See what was added since."""
        with self._watch.guard():
            return bool(self._inner.refresh())


class WatchedRows(Watched):
    """The rows of a source."""

    def __iter__(self) -> Iterator[Any]:
        return self._each(lambda: self._inner, lambda _: None)


class WatchedKnown(WatchedRows):
    """The rows of a source that knows them again."""

    @property
    def num_bytes(self) -> int:
        """How much there is to read."""
        with self._watch.guard():
            found: int = self._inner.num_bytes
        self._watch.check(wrong_type(found, int, "num_bytes, a number"))
        return found

    def fingerprint(self) -> str:
        """Return what changes with the rows."""
        with self._watch.guard():
            found: str = self._inner.fingerprint()
        self._watch.check(wrong_type(found, str, "a fingerprint, a text"))
        return found


def watched_optimizer(inner: Any, watch: Watch) -> Any:
    """Watch an optimizer, which stays what it is: torch looks at its class and attributes.

    It holds what calls it, which therefore does not hold it: else its states, larger than the
    draft, would stay in memory until Python looks for cycles.
    """
    for name in ("step", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(inner, name)
        own = isinstance(method, MethodType) and method.__self__ is inner
        setattr(inner, name, _guarded(_weakly(method) if own else method, watch))
    return inner


def _weakly(method: MethodType) -> Callable[..., Any]:
    """Return a method whose object somebody else has to keep; who calls it does."""
    held = WeakMethod(method)

    def call(*arguments: Any, **named: Any) -> Any:
        alive = held()
        assert alive is not None
        return alive(*arguments, **named)

    return call


def _guarded(method: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with watch.guard():
            return method(*arguments, **named)

    return call


def watched_reader(inner: Any, watch: Watch) -> WatchedReader:
    """Watch a reader, one that grows as such."""
    return (WatchedGrowth if isinstance(inner, GrowingReader) else WatchedReader)(inner, watch)


def watched_rows(inner: Any, watch: Watch) -> WatchedRows:
    """Watch the rows of a source, known ones as such."""
    known = hasattr(inner, "num_bytes") and hasattr(inner, "fingerprint")
    return (WatchedKnown if known else WatchedRows)(inner, watch)
