"""A finished run of a method with an option of each kind, and every way to read its draft back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from specforge_core.capture.job import run_capture
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.testing.runs import load
from specforge_core.testing.toy import save_toy_target
from specforge_core.train.run import train

from ..runs import linear_run

# a method with an option of each kind, and an export that can be read back
METHOD = """
    from typing import Annotated
    from pydantic import Field
    from specforge_core import hookimpl
    from specforge_core.config import MayChange
    from specforge_core.types import Draft, Export
    from specforge_linear import (
        Head, LinearConfig, specforge_adapter, specforge_proposer, specforge_train_step)

    class Config(LinearConfig):
        layout: str = "same"
        mask: Annotated[int | None, MayChange.ALWAYS] = None
        decay: Annotated[float, MayChange.AT_START] = 0.5
        chunk: Annotated[int, MayChange.ALWAYS] = 8

    @hookimpl
    def specforge_config():
        return Config

    @hookimpl
    def specforge_draft(config, target):
        mask = target.vocab_size - 1 if config.mask is None else config.mask
        model = Head(target.hidden_size, target.vocab_size)
        return Draft(model=model, resolved={"mask": mask, "eps": target.config["rms_norm_eps"]})

    @hookimpl
    def specforge_export(draft, config, format):
        weights = dict(draft.model.state_dict())
        told = {"layout": config.layout, "chunk": config.chunk, "nested": {"a": {"b": 1}}}
        return Export(config=told, weights=weights)

    @hookimpl
    def specforge_import(draft, export):
        draft.model.load_state_dict(dict(export.weights))
        return True
    """


def make(tmp_path: Path) -> None:
    save_toy_target(tmp_path / "target")
    save_toy_target(tmp_path / "seed", seed=9)
    save_toy_target(tmp_path / "eps", rms_norm_eps=0.25)
    for name in ("template", "tokenizer"):
        shutil.copytree(tmp_path / "target", tmp_path / name)
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text().replace("im_start|>", "im_start|>~"))
    special = tmp_path / "tokenizer" / "tokenizer_config.json"
    special.write_text(special.read_text().replace("<|endoftext|>", "<|mask|>"))
    path = linear_run(tmp_path, tmp_path / "target")
    raw = yaml.safe_load(path.read_text())
    raw["strategy"] = {"name": "method"}
    raw["train"] |= {"max_steps": 2, "save_every": 2}
    path.write_text(yaml.safe_dump(raw))
    train(*load(path))
    export_checkpoint(tmp_path / "run", "hf", tmp_path / "export", force=False)


def uses(config: Path) -> dict[str, Callable[..., object]]:
    """Return each way to read a draft back, as a function of overrides."""
    path = config.parent

    def resume(*options: str) -> None:
        train(*load(config, "train.max_steps=3", *options))

    def offline(*options: str) -> None:
        capture = f"data.capture_dir={path / 'capture'}"
        shutil.rmtree(path / "capture", ignore_errors=True)
        run_capture(*load(config, capture, *options))
        train(*load(config, "train.max_steps=3", capture, *options))

    def start(*options: str) -> None:
        begun = (f"train.init_from={path / 'run'}", f"output_dir={path / 'begun'}")
        train(*load(config, *begun, *options))

    def evaluate(*options: str) -> None:
        restore(*load(config, *options), path / "run")

    def evaluate_export(*options: str) -> None:
        restore(*load(config, *options), path / "export")

    def export(*options: str) -> None:
        export_checkpoint(path / "run", "hf", path / "out", force=True, overrides=options)

    def export_asked(*options: str) -> None:
        asked = load(config, *options)
        export_checkpoint(path / "run", "hf", path / "out", force=True, asked=asked)

    found = (resume, offline, start, evaluate, evaluate_export, export, export_asked)
    return {use.__name__: use for use in found}
