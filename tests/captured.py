"""What captures say they are; a strategy whose captures are verified, and a wrong engine."""

from __future__ import annotations

from typing import Any

from specforge_core.capture.manifest import CaptureIdentity
from specforge_core.plugins import core_manager
from specforge_core.strategy import Strategy


def bare_strategy() -> Strategy:
    """Return a strategy called tiny of the core's defaults alone."""
    return Strategy("tiny", "specforge-tiny 0.1.0", core_manager())


def identity(**given: Any) -> CaptureIdentity:
    """Return the identity of a capture by a strategy called tiny."""
    usual: dict[str, Any] = {
        "strategy": "tiny",
        "strategy_package": "specforge-tiny 0.1.0",
        "core_version": "0.1.0",
        "spec_version": 1,
        "layers": (1,),
        "final": "none",
        "fields": {},
        "target": "target",
        "target_revision": None,
        "target_fingerprint": "t",
        "tokenizer_fingerprint": "k",
        "chat_template_fingerprint": "c",
        "hidden_size": 4,
        "num_layers": 6,
        "vocab_size": 100,
        "max_length": 64,
    }
    return CaptureIdentity(**{**usual, **given})


SOURCE = """
    from dataclasses import dataclass
    import torch
    from specforge_core import hookimpl
    from specforge_core.config import StrategyConfig
    from specforge_core.types import CaptureSpec, Field, Problem

    class Config(StrategyConfig):
        layers: tuple[int, ...] = (1, 3)
        final: str = "post_norm"
        keep_ids: bool = True
        complain: bool = False

    @dataclass
    class Adapter:
        spec: CaptureSpec

        def __call__(self, capture):
            states = [capture.hidden_states[i] for i in self.spec.layers]
            sample = {
                "input_ids": capture.input_ids,
                "loss_mask": capture.loss_mask,
                "hidden": torch.cat(states, -1),
                "final": capture.final,
            }
            return {name: sample[name] for name in self.spec.fields}

    @hookimpl
    def specforge_config():
        return Config

    @hookimpl
    def specforge_adapter(config, target):
        tokens = Field(shape=(None,), dtype="int64")
        fields = {
            "hidden": Field(shape=(None, len(config.layers) * target.hidden_size), dtype="float32"),
            "final": Field(shape=(None, target.hidden_size), dtype="float32"),
        }
        if config.keep_ids:
            fields |= {"input_ids": tokens, "loss_mask": tokens}
        return Adapter(CaptureSpec(layers=config.layers, final=config.final, fields=fields))

    @hookimpl
    def specforge_verify_capture(config, sample, fresh):
        if config.complain and fresh is not None:
            assert set(fresh.hidden_states) == set(config.layers)
            text = "complains of a fresh sample. Try: strategy.complain=false"
            return [Problem(where="tiny", message=text)]

    @hookimpl
    def specforge_draft(): ...

    @hookimpl
    def specforge_train_step(): ...
"""
# an engine that is wrong on purpose, as a cross-cutting plugin
WRONG = """
    from dataclasses import replace
    from specforge_core import hookimpl
    from specforge_core.target.engine import TransformersEngine

    class Wrong(TransformersEngine):
        def capture(self, prompts, spec):
            shifted = replace(spec, layers=tuple(i + STEP for i in spec.layers), final=FINAL)
            for capture in super().capture(prompts, shifted):
                states = {i - STEP: state for i, state in capture.hidden_states.items()}
                yield replace(capture, hidden_states=states)

    @hookimpl
    def specforge_target_engine(target, device):
        return Wrong.load(target, device) if target.engine == "wrong" else None
"""
