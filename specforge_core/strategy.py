"""The chosen strategy of one run, as typed calls.

The only module that calls hooks.  Everything else calls these methods, so a
hook's name and arguments are spelled once and checked by mypy everywhere, and
what goes wrong in a plugin names its package and the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import blame, plugins
from .calls import Calls
from .errors import CheckpointError, ConfigError, PluginError
from .returned import wrong_draft, wrong_export, wrong_optimizers, wrong_spec
from .text import shorten
from .types import CaptureSpec, Draft, Export, NotServed, Problem
from .watch import (
    WatchedEngine,
    WatchedProposer,
    watched_optimizer,
    watched_reader,
    watched_rows,
)

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from .config import DataConfig, RunConfig, Section, StrategyConfig, TargetConfig, TrainConfig
    from .types import (
        Adapter,
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

# what code raises of a file's value that is of another kind than it should be
WRONG_VALUE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


class Strategy(Calls):
    """One installed strategy with the core's defaults and the cross-cutting plugins."""

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
        from .config import Section

        models: dict[str, type[Section]] = {}
        for impl in self.pm.hook.specforge_plugin_config.get_hookimpls():
            if impl.wrapper or impl.hookwrapper:
                continue
            hook, name = "specforge_plugin_config", impl.plugin_name
            with self.guard(hook, name, status=2):
                found: Any = impl.function()
            if not (isinstance(found, type) and issubclass(found, Section)):
                raise self._unexpected(hook, found, "a subclass of Section", name)
            models[name] = found
        return models

    # ---- data and capture ----

    def conversations(self, source: str, data: DataConfig) -> Iterable[Mapping[str, Any]]:
        found: Iterable[Mapping[str, Any]] | None = self._first(
            "specforge_conversations", source=source, data=data
        )
        if found is None:
            raise PluginError(f"data source {source!r}: no installed plugin reads it")
        self._with("specforge_conversations", found, "__iter__")
        if isinstance(found, str | bytes | Mapping):
            raise self._unexpected("specforge_conversations", found, "rows to go through")
        rows: Iterable[Mapping[str, Any]]
        rows = self.watched("specforge_conversations", found, watched_rows)
        return rows

    def adapter(self, config: StrategyConfig, target: TargetInfo) -> Adapter:
        found: Adapter = self._need("specforge_adapter", config=config, target=target)
        hook = "specforge_adapter"
        self._with(hook, found, "spec", "__call__")
        if not isinstance(found.spec, CaptureSpec):
            raise self._unexpected(hook, found.spec, "an object with a CaptureSpec")
        self.check(hook, wrong_spec(found.spec, target.num_layers), value=found)
        return found

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
        self._with("specforge_target_engine", found, *asked)
        engine: TargetEngine = self.watched("specforge_target_engine", found, WatchedEngine)
        return engine

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
            hook, config=config, target=target, spec=spec, sample=dict(sample), fresh=fresh
        )  # a copy: what one takes out of it stays in the sample
        for answer in found:
            for problem in [answer] if not isinstance(answer, list) else answer:
                if not isinstance(problem, Problem) or problem is answer:
                    raise self._unexpected(hook, problem, "a list of Problem")
        return [problem for answer in found for problem in answer]

    def reader(
        self, config: StrategyConfig, spec: CaptureSpec, target: TargetInfo, path: Path
    ) -> Reader:
        hook = "specforge_reader"
        found: Reader = self._need(hook, config=config, spec=spec, target=target, path=path)
        self._with(hook, found, "__len__", "__getitem__")
        reader: Reader = self.watched(hook, found, watched_reader)
        return reader

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
        draft = self.check_returned("specforge_draft", found, Draft)
        with self.guard("specforge_draft", status=2):  # its functions are tried
            wrong = wrong_draft(draft)
        self.check("specforge_draft", wrong)
        return draft

    def train_step(self, config: StrategyConfig) -> TrainStep:
        found: TrainStep = self._need("specforge_train_step", config=config)
        return self._with("specforge_train_step", found, "__call__")

    def optimizers(self, train: TrainConfig, draft: Draft) -> list[Optimizer]:
        hook = "specforge_optimizers"
        found: list[Optimizer] | None = self._first(hook, train=train, draft=draft)
        if found is None:
            raise PluginError(
                f"train.optimizer {train.optimizer!r} is not provided by any installed plugin. "
                "Try: train.optimizer=adamw, or muon"
            )
        if not isinstance(found, list | tuple):
            raise self._unexpected(hook, found, "a list of optimizers")
        asked = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
        for optimizer in found:
            self._with(hook, optimizer, *asked)
        with self.guard(hook, status=2):  # a group may lack its parameters
            wrong = wrong_optimizers(found, draft.model)
        self.check(hook, wrong, value=found[0] if found else None)
        return [self.watched(hook, optimizer, watched_optimizer) for optimizer in found]

    def schedule(self, train: TrainConfig) -> Callable[[float], float]:
        found: Callable[[float], float] | None = self._first("specforge_schedule", train=train)
        if found is None:
            raise PluginError(
                f"train.schedule {train.schedule!r} is not provided by any installed plugin. "
                "Try: train.schedule=cosine, constant or wsd"
            )
        self._with("specforge_schedule", found, "__call__")
        who = blame.package_behind(self.pm, "specforge_schedule", found, self.name)

        def factor(progress: float) -> float:
            with self.guard("specforge_schedule", package=who):
                value = found(progress)
            if not (isinstance(value, float | int) and 0 <= value < float("inf")):
                raise self._unexpected("specforge_schedule", value, f"a factor, not {value!r:.80}")
            return value

        return factor

    def trackers(self, run: RunConfig) -> list[tuple[str, Tracker]]:
        """Return the run's trackers, each with the name of its package."""
        hook = "specforge_tracker"
        found: list[Tracker] = self._first(hook, run=run)
        return [
            (
                blame.package_behind(self.pm, hook, tracker, self.name),
                self._with(hook, tracker, "start", "log", "event", "close"),
            )
            for tracker in found
        ]

    # ---- evaluation and export ----

    def proposer(self, config: StrategyConfig, draft: Draft, target: TargetInfo) -> Proposer:
        hook = "specforge_proposer"
        found: Proposer = self._need(hook, config=config, draft=draft, target=target)
        with self.guard(hook):
            self._with(hook, found, "start", "propose", "accept", "max_tokens")
            most: Any = found.max_tokens
        if not isinstance(most, int) or most < 1:
            expected = f"an object with max_tokens of at least 1, not {most!r:.80}"
            raise self._unexpected(hook, found, expected)
        proposer: Proposer = self.watched(hook, found, WatchedProposer)
        return proposer

    def export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, format: str
    ) -> Export:
        hook = "specforge_export"
        found = self._first(hook, config=config, draft=draft, target=target, format=format)
        if found is None:
            others = " or ".join(name for name in ("hf", "sglang", "vllm") if name != format)
            raise PluginError(
                f"strategy {self.name!r} cannot export to format {format!r}. "
                f"Try: --format {others}, or what its package documents"
            )
        export = self.check_returned(hook, found, Export)
        self.check(hook, wrong_export(export))
        return export

    def load_export(
        self, config: StrategyConfig, draft: Draft, target: TargetInfo, export: Export
    ) -> None:
        """Call `specforge_import` (`import` is a keyword, so the method is not named so)."""
        hook = "specforge_import"
        try:
            done = self._first(hook, config=config, draft=draft, target=target, export=export)
        except (PluginError, ConfigError) as exc:
            if isinstance(exc, PluginError) and not isinstance(exc.__cause__, WRONG_VALUE):
                raise
            raise CheckpointError(
                f"config.json of the export has a value that cannot be used: {exc}. "
                "Export again, or give the output_dir of a run of this strategy"
            ) from exc
        if done is not None and not isinstance(done, bool):
            raise self._unexpected(hook, done, "True once the weights are loaded, or None")
        if not done:
            raise PluginError(
                f"strategy {self.name!r} cannot load an exported directory whose architectures are "
                f"{shorten(export.config.get('architectures'))}. "
                "Give an export, or the output_dir of a run, of this strategy instead"
            )

    def serve(
        self, target: TargetConfig, export: Path, draft_tokens: int
    ) -> DraftServer | NotServed:
        found: DraftServer | NotServed | None = self._first(
            "specforge_serve", target=target, export=export, draft_tokens=draft_tokens
        )
        if found is None:
            impls = self.pm.hook.specforge_serve.get_hookimpls()
            able = {impl.plugin_name for impl in impls if not impl.wrapper}
            tries = [f"target.engine={name}" for name in sorted(able - {"core", self.name})]
            hint = ", or ".join(tries) or "pip install specforge-sglang, then target.engine=sglang"
            return NotServed(reason=f"target.engine={target.engine} serves no drafts. Try: {hint}")
        if isinstance(found, NotServed):
            return found
        return self._with("specforge_serve", found, "name", "answer", "close")
