"""The chosen strategy of one run, as typed calls.

The only module that calls hooks.  Everything else calls these methods, so a
hook's name and arguments are spelled once and checked by mypy everywhere, and
what goes wrong in a plugin names its package and the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from . import plugins
from .errors import PluginError, SpecForgeError
from .types import Draft, Export, NotServed, Problem

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from .config import DataConfig, RunConfig, Section, StrategyConfig, TargetConfig, TrainConfig
    from .types import (
        Adapter,
        CaptureSpec,
        Collate,
        DataInfo,
        DraftServer,
        Proposer,
        Reader,
        Sample,
        TargetCapture,
        TargetEngine,
        TargetInfo,
        Tracker,
        TrainStep,
        Transform,
    )

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Strategy:
    """One installed strategy with the core's defaults and the cross-cutting plugins."""

    name: str
    package: str  # distribution name and version
    pm: pluggy.PluginManager

    @classmethod
    def load(cls, name: str, *, using: frozenset[str] = frozenset()) -> Strategy:
        """Import a strategy; of the plugins with a section of their own only those in `using`."""
        found = plugins.find_strategy(name)
        pm = plugins.run_manager(name, using=using)
        return cls(name, f"{found.dist} {found.version}", pm)

    # ---- config ----

    def config(self) -> type[StrategyConfig]:
        from .config import StrategyConfig

        found = self._first("specforge_config")
        if found is None:
            return StrategyConfig
        if not (isinstance(found, type) and issubclass(found, StrategyConfig)):
            raise self._unexpected("specforge_config", found, "a subclass of StrategyConfig")
        return found

    def plugin_configs(self) -> dict[str, type[Section]]:
        """Return the sections of cross-cutting plugins, by the plugins' names."""
        models: dict[str, type[Section]] = {}
        for impl in self.pm.hook.specforge_plugin_config.get_hookimpls():
            if impl.wrapper or impl.hookwrapper:
                continue
            with self.guard("specforge_plugin_config", impl.plugin_name):
                found: Any = impl.function()
                models[impl.plugin_name] = found
        return models

    # ---- data and capture ----

    def conversations(self, source: str, data: DataConfig) -> Iterable[Mapping[str, Any]]:
        found: Iterable[Mapping[str, Any]] | None = self._first(
            "specforge_conversations", source=source, data=data
        )
        if found is None:
            raise PluginError(f"data source {source!r}: no installed plugin reads it")
        return found

    def adapter(self, config: StrategyConfig, target: TargetInfo) -> Adapter:
        found: Adapter = self._need("specforge_adapter", config=config, target=target)
        return self._with("specforge_adapter", found, "spec", "__call__")

    def target_engine(self, target: TargetConfig, device: torch.device) -> TargetEngine:
        found: TargetEngine | None = self._first(
            "specforge_target_engine", target=target, device=device
        )
        if found is None:
            raise PluginError(
                f"target.engine {target.engine!r} is not provided by any installed plugin. "
                f"Try: pip install specforge-{target.engine}, or target.engine=transformers"
            )
        asked = ("info", "supports", "capture", "generate", "close")
        return self._with("specforge_target_engine", found, *asked)

    def verify_capture(
        self,
        config: StrategyConfig,
        target: TargetInfo,
        spec: CaptureSpec,
        sample: Sample,
        fresh: TargetCapture | None,
    ) -> list[Problem]:
        hook = "specforge_verify_capture"
        found = self._first(
            hook, config=config, target=target, spec=spec, sample=sample, fresh=fresh
        )
        problems = [problem for answer in found for problem in answer]
        if wrong := [problem for problem in problems if not isinstance(problem, Problem)]:
            raise self._unexpected(hook, wrong[0], "a list of Problem")
        return problems

    def reader(
        self, config: StrategyConfig, spec: CaptureSpec, target: TargetInfo, path: Path
    ) -> Reader:
        hook = "specforge_reader"
        found: Reader = self._need(hook, config=config, spec=spec, target=target, path=path)
        return self._with(hook, found, "__len__", "__getitem__")

    # ---- batches ----

    def transform(self, config: StrategyConfig, spec: CaptureSpec, max_length: int) -> Transform:
        hook = "specforge_transform"
        found: Transform = self._need(hook, config=config, spec=spec, max_length=max_length)
        return self._with(hook, found, "__call__")

    def collate(self, config: StrategyConfig, spec: CaptureSpec, draft: Draft) -> Collate:
        hook = "specforge_collate"
        found: Collate = self._need(hook, config=config, spec=spec, draft=draft)
        return self._with(hook, found, "__call__")

    # ---- training ----

    def draft(self, config: StrategyConfig, target: TargetInfo, data: DataInfo | None) -> Draft:
        found = self._need("specforge_draft", config=config, target=target, data=data)
        return self._typed("specforge_draft", found, Draft)

    def train_step(self, config: StrategyConfig) -> TrainStep:
        found: TrainStep = self._need("specforge_train_step", config=config)
        return self._with("specforge_train_step", found, "__call__")

    def optimizers(self, train: TrainConfig, draft: Draft) -> list[Optimizer]:
        found: list[Optimizer] | None = self._first(
            "specforge_optimizers", train=train, draft=draft
        )
        if not found:
            raise PluginError(
                f"train.optimizer {train.optimizer!r} is not provided by any installed plugin. "
                "Try: train.optimizer=adamw, or muon"
            )
        return found

    def schedule(self, train: TrainConfig) -> Callable[[float], float]:
        found: Callable[[float], float] | None = self._first("specforge_schedule", train=train)
        if found is None:
            raise PluginError(
                f"train.schedule {train.schedule!r} is not provided by any installed plugin. "
                "Try: train.schedule=cosine, constant or wsd"
            )
        return self._with("specforge_schedule", found, "__call__")

    def trackers(self, run: RunConfig) -> list[tuple[str, Tracker]]:
        """Return the run's trackers, each with the name of its package."""
        hook = "specforge_tracker"
        found: list[Tracker] = self._first(hook, run=run)
        return [
            (
                plugins.package_behind(self.pm, tracker),
                self._with(hook, tracker, "start", "log", "event", "close"),
            )
            for tracker in found
        ]

    # ---- evaluation and export ----

    def proposer(self, config: StrategyConfig, draft: Draft, target: TargetInfo) -> Proposer:
        hook = "specforge_proposer"
        found: Proposer = self._need(hook, config=config, draft=draft, target=target)
        return self._with(hook, found, "start", "propose", "accept", "max_tokens")

    def export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, format: str
    ) -> Export:
        hook = "specforge_export"
        found = self._first(hook, config=config, draft=draft, target=target, format=format)
        if found is None:
            raise PluginError(
                f"strategy {self.name!r} cannot export to format {format!r}. "
                "Try: --format hf, sglang or vllm, or what its package documents"
            )
        return self._typed(hook, found, Export)

    def load_export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, export: Export
    ) -> None:
        """Call `specforge_import` (`import` is a keyword, so the method is not named so)."""
        hook = "specforge_import"
        if not self._first(hook, config=config, draft=draft, target=target, export=export):
            raise PluginError(
                f"strategy {self.name!r} cannot load an exported directory. "
                "Give a checkpoint instead: --draft OUTPUT_DIR"
            )

    def serve(
        self, target: TargetConfig, export: Path, draft_tokens: int
    ) -> DraftServer | NotServed:
        found: DraftServer | NotServed | None = self._first(
            "specforge_serve", target=target, export=export, draft_tokens=draft_tokens
        )
        if found is None:
            return NotServed(
                reason=f"target.engine={target.engine} serves no drafts. "
                "Try: target.engine=ENGINE of an installed plugin that does"
            )
        return found

    # ---- what goes wrong in a plugin ----

    @contextmanager
    def guard(self, hook: str, plugin: str | None = None) -> Iterator[None]:
        """Turn what a plugin raises, in a hook or in what the hook returned, into a PluginError."""
        try:
            yield
        except (SpecForgeError, OSError, MemoryError):
            raise
        except Exception as exc:
            if _out_of_memory(exc):
                raise
            who = plugins.blamed(self.pm, hook, exc, plugin or self.name)
            raise PluginError(f"{who}, {hook}: {type(exc).__name__}: {exc}") from exc

    def check_returned(self, hook: str, value: object, kind: type[T], text: str) -> T:
        """Return what a plugin's callable returned; PluginError if it is of another type."""
        if not isinstance(value, kind):
            raise self._unexpected(hook, value, text)
        return value

    def _first(self, hook: str, **arguments: object) -> Any:
        with self.guard(hook):
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

    def _unexpected(self, hook: str, value: object, expected: str) -> PluginError:
        who = plugins.provider(self.pm, hook, self.name)
        return PluginError(f"{who}, {hook}: returned {type(value).__name__}, expected {expected}")


def _out_of_memory(exc: Exception) -> bool:
    return type(exc).__name__ == "OutOfMemoryError"
