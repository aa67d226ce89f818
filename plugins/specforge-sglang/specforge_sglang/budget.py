"""What is on its way between servers and trainer, and how much may be."""

from __future__ import annotations

from dataclasses import dataclass

from specforge_core.types import TargetCapture


@dataclass(slots=True)
class Budget:
    """Bytes that may be on their way at once: a slow trainer holds back the servers."""

    limit: int
    _used: int = 0

    def fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self.limit

    def take(self, size: int) -> None:
        self._used += size

    def give(self, size: int) -> None:
        self._used -= size


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one prompt."""

    size: int
    capture: TargetCapture | None
    error: BaseException | None = None
