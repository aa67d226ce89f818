"""All a target goes through, in one process: captured, trained, evaluated, exported, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specforge_core.capture.job import run_capture
from specforge_core.capture.store import ShardReader
from specforge_core.config import RunConfig
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.errors import ConfigError
from specforge_core.evaluate.run import evaluate
from specforge_core.strategy import Strategy
from specforge_core.target.skeleton import text_model
from specforge_core.testing.runs import load, losses, write_run
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train

FORMATS = ("hf", "sglang", "vllm")
STRATEGIES: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": 4, "num_layers": 1, "num_capture_layers": 2, "num_anchors": 8},
    "eagle3": {"steps": 2, "draft_vocab_size": 128, "draft_length": 3},
}


def open_run(
    strategy: str, target: Path, directory: Path, *overrides: str
) -> tuple[RunConfig, Strategy]:
    """Return a run of 2 steps in float32 on a few short conversations, with its evaluation."""
    directory.mkdir()
    prompts = write_conversations(directory / "prompts.jsonl", 2, seed=7)
    config = write_run(
        directory,
        target,
        conversations=4,
        strategy={"name": strategy, **STRATEGIES[strategy]},
        data={"capture_dir": str(directory / "capture")},
        train={"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3, "compute_dtype": "float32"},
        eval={"prompts": {"toy": str(prompts)}, "max_new_tokens": 10, "dtype": "float32"},
    )
    return load(config, *overrides)


def whole_chain(
    strategy_name: str, target: Path, directory: Path, model: Any, *overrides: str
) -> str:
    """Take a saved target through everything; return the formats that refused it.

    `model` is the target as transformers made it, which the captured states are compared with.
    """
    run, strategy = open_run(strategy_name, target, directory, *overrides)
    run_capture(run, strategy)
    check_states(run, strategy, model)
    train(run, strategy)
    assert all(torch.tensor(losses(run.output_dir)).isfinite())
    restored = restore(run, strategy, run.output_dir)
    report = evaluate(run, strategy, restored.draft)
    assert report.lossless, report.differences or report.lossless_reason
    assert report.verifications > 0
    refused = []
    for format in FORMATS:
        place = directory / format
        try:
            export_checkpoint(run.output_dir, format, place, force=False, overrides=overrides)
        except ConfigError as exc:
            refused.append(f"{format}: {exc}")
            continue
        check_weights(run, strategy, place)
    return "; ".join(refused)


def check_states(run: RunConfig, strategy: Strategy, model: Any) -> None:
    """Compare every stored sample with what the model itself says of its tokens."""
    assert run.data.capture_dir is not None
    reader: Any = strategy.reader(
        run.strategy, _spec(run, strategy), restore_info(run), run.data.capture_dir
    )
    assert isinstance(reader, ShardReader)
    layers = _spec(run, strategy).layers
    for place in range(len(reader)):
        sample = reader[place]
        with torch.no_grad():
            found = text_model(model)(
                input_ids=sample["input_ids"][None], output_hidden_states=True
            )
        first = 0 if model.config.model_type == "mamba2" else 1  # it does not list the embedding
        states = torch.cat([found.hidden_states[i + first][0] for i in layers], dim=-1)
        near(sample["hidden_states"], states)
        if "target_argmax" in sample:
            logits = found.logits[0, :, : model.config.get_text_config().vocab_size].float()
            best, chosen = logits.max(-1).values, sample["target_argmax"][:, None]
            assert (best - logits.gather(1, chosen)[:, 0] < 1e-3).all()
            torch.testing.assert_close(
                sample["target_logsumexp"], logits.logsumexp(-1), rtol=1e-4, atol=1e-3
            )


def near(stored: torch.Tensor, states: torch.Tensor) -> None:
    """Compare states that were stored in bfloat16."""
    error = (stored.float() - states.float()).norm() / states.float().norm()
    assert error < 0.02, f"states differ by {error:.1%}"


def _spec(run: RunConfig, strategy: Strategy) -> Any:
    return strategy.adapter(run.strategy, restore_info(run)).spec


def restore_info(run: RunConfig) -> Any:
    from specforge_core.target.info import load_target_info

    return load_target_info(run.target)


def check_weights(run: RunConfig, strategy: Strategy, place: Path) -> None:
    """Read an export back; its weights are the checkpoint's, rounded."""
    trained = restore(run, strategy, run.output_dir).draft.model.state_dict()
    back = restore(run, strategy, place).draft.model.state_dict()
    assert trained.keys() == back.keys()
    for name, value in trained.items():
        torch.testing.assert_close(back[name], value, rtol=1e-2, atol=1e-2)
