"""The chosen strategy of one run, as typed calls.

The only module that touches `pm.hook`.  Everything else calls these methods,
so a hook's name and arguments are spelled once and checked by mypy everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pluggy

from . import plugins
from .errors import PluginError
from .types import NotServed

if TYPE_CHECKING:
    from torch import Tensor

    from .capture.manifest import CaptureManifest
    from .config import StrategyConfig, TargetConfig
    from .types import (
        Adapter,
        CaptureSpec,
        Collate,
        Draft,
        DraftServer,
        Export,
        Problem,
        Proposer,
        Reader,
        Sample,
        TargetCapture,
        TargetEngine,
        TargetInfo,
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
    def load(cls, name: str) -> Strategy:
        found = plugins.find_strategy(name)
        return cls(name, f"{found.dist} {found.version}", plugins.run_manager(name))

    def config(self) -> type[StrategyConfig]:
        from .config import StrategyConfig

        found: type[StrategyConfig] | None = self.pm.hook.specforge_config()
        return found or StrategyConfig

    def target_engine(self, target: TargetConfig) -> TargetEngine:
        found: TargetEngine | None = self.pm.hook.specforge_target_engine(target=target)
        if found is None:
            raise PluginError(
                f"target.engine {target.engine!r} is not provided by any installed plugin. "
                f"Try: pip install specforge-{target.engine}, or target.engine=transformers"
            )
        return found

    def adapter(self, config: StrategyConfig, target: TargetInfo) -> Adapter:
        found: Adapter | None = self.pm.hook.specforge_adapter(config=config, target=target)
        return self._need("specforge_adapter", found)

    def verify_capture(
        self,
        config: StrategyConfig,
        spec: CaptureSpec,
        manifest: CaptureManifest,
        sample: Sample,
        fresh: TargetCapture | None,
    ) -> list[Problem]:
        found: list[list[Problem]] = self.pm.hook.specforge_verify_capture(
            config=config, spec=spec, manifest=manifest, sample=sample, fresh=fresh
        )
        return [problem for problems in found for problem in problems]

    def reader(
        self, config: StrategyConfig, spec: CaptureSpec, manifest: CaptureManifest, path: Path
    ) -> Reader:
        found: Reader | None = self.pm.hook.specforge_reader(
            config=config, spec=spec, manifest=manifest, path=path
        )
        return self._need("specforge_reader", found)

    def transform(
        self, config: StrategyConfig, spec: CaptureSpec, max_length: int, training: bool
    ) -> Transform:
        found: Transform | None = self.pm.hook.specforge_transform(
            config=config, spec=spec, max_length=max_length, training=training
        )
        return self._need("specforge_transform", found)

    def collate(self, config: StrategyConfig, spec: CaptureSpec) -> Collate:
        found: Collate | None = self.pm.hook.specforge_collate(config=config, spec=spec)
        return self._need("specforge_collate", found)

    def draft(
        self,
        config: StrategyConfig,
        target: TargetInfo,
        manifest: CaptureManifest | None,
        token_counts: Tensor | None,
    ) -> Draft:
        found: Draft | None = self.pm.hook.specforge_draft(
            config=config, target=target, manifest=manifest, token_counts=token_counts
        )
        return self._need("specforge_draft", found)

    def train_step(self, config: StrategyConfig) -> TrainStep:
        found: TrainStep | None = self.pm.hook.specforge_train_step(config=config)
        return self._need("specforge_train_step", found)

    def step_finished(self, step: int, metrics: dict[str, float], output_dir: Path) -> None:
        self.pm.hook.specforge_step_finished(step=step, metrics=metrics, output_dir=output_dir)

    def proposer(self, config: StrategyConfig, draft: Draft, target: TargetInfo) -> Proposer:
        found: Proposer | None = self.pm.hook.specforge_proposer(
            config=config, draft=draft, target=target
        )
        return self._need("specforge_proposer", found)

    def export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, format: str
    ) -> Export:
        found: Export | None = self.pm.hook.specforge_export(
            config=config, draft=draft, target=target, format=format
        )
        if found is None:
            raise PluginError(
                f"strategy {self.name!r} cannot export to format {format!r}. "
                "Try: --format hf, sglang or vllm, or what its package documents"
            )
        return found

    def load_export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, export: Export
    ) -> None:
        """Call `specforge_import` (`import` is a keyword, so the method is not named so)."""
        done: bool | None = self.pm.hook.specforge_import(
            config=config, draft=draft, target=target, export=export
        )
        if not done:
            raise PluginError(
                f"strategy {self.name!r} cannot load an exported directory. "
                "Give a checkpoint instead: --draft OUTPUT_DIR"
            )

    def serve(
        self, target: TargetConfig, export: Path, draft_tokens: int
    ) -> DraftServer | NotServed:
        found: DraftServer | NotServed | None = self.pm.hook.specforge_serve(
            target=target, export=export, draft_tokens=draft_tokens
        )
        if found is None:
            return NotServed(
                f"target.engine={target.engine} serves no drafts. "
                "Try: target.engine=ENGINE of an installed plugin that does"
            )
        return found

    def _need(self, hook: str, result: T | None) -> T:
        if result is None:
            raise PluginError(
                f"strategy {self.name!r} returned nothing from {hook}. "
                f"Try: specforge check {self.name}"
            )
        return result
