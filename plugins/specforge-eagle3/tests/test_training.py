"""Real runs of the trainer on a toy target, online and offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specforge_core.capture.job import run_capture
from specforge_core.capture.verify import verify_directory
from specforge_core.drafts.load import export_checkpoint, restore
from specforge_core.errors import CaptureError, CheckpointError, ConfigError
from specforge_core.evaluate.run import evaluate
from specforge_core.testing.close import close
from specforge_core.testing.forked import cli
from specforge_core.testing.runs import finish, lines, load, losses, write_run
from specforge_core.testing.toy import save_toy_target, write_conversations
from specforge_core.train.plan import plan_run
from specforge_core.train.run import train

# six steps of three unrolled layers, at most 96 wide; AdamW divides by small moments
TERMS = 6 * 3 * 5 * 96


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    save_toy_target(path, num_hidden_layers=8)
    return path


@pytest.fixture
def config(tmp_path: Path, target: Path) -> Path:
    return write(tmp_path, target)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """The config of a run of 30 steps, finished; nobody changes it."""
    config = write(tmp_path_factory.mktemp("learned"), target)
    train(*load(config, "train.max_steps=30"))
    return config


def write(folder: Path, target: Path) -> Path:
    return write_run(
        folder,
        target,
        conversations=24,
        target={"batch_tokens": 512},
        strategy={"name": "eagle3", "steps": 3, "draft_vocab_size": 64, "layers": [1, 3, 4]},
        train={"max_steps": 6, "batch_size": 3, "learning_rate": 0.01, "save_every": 3},
    )


@pytest.mark.parametrize("vocabulary", ["64", pytest.param("full", marks=pytest.mark.slow)])
def test_a_draft_learns_and_says_how_well(config: Path, tmp_path: Path, vocabulary: str) -> None:
    train(*load(config, "train.max_steps=40", f"strategy.draft_vocab_size={vocabulary}"))
    rows = lines(tmp_path / "run")
    assert rows[-1]["acceptance_length"] > rows[0]["acceptance_length"] + 0.2
    assert rows[-1]["accuracy_1"] > rows[0]["accuracy_1"] + 0.2
    assert {"accuracy_1", "accuracy_2", "accuracy_3", "in_draft_vocab"} <= rows[-1].keys()
    first, last = rows[0]["acceptance_rate"], rows[-1]["acceptance_rate"]
    if vocabulary == "full":
        assert first + 0.2 < last < 1
    else:  # this target gives about 0.4 to the 64 tokens that can be drafted at all
        assert 1.3 * first < last < 0.4


@pytest.mark.slow
def test_float8_trains_about_as_float32_also_recomputed(config: Path, tmp_path: Path) -> None:
    sizes = "train.batch_size=2", "train.accumulate=2"
    options = (*sizes, "train.max_steps=12", "train.learning_rate=0.003")
    train(*load(config, *options))
    float8 = (*options, "train.precision=fp8", f"output_dir={tmp_path / 'float8'}")
    train(*load(config, *float8))
    found, plain = losses(tmp_path / "float8"), losses(tmp_path / "run")
    assert found != plain
    assert found == pytest.approx(plain, rel=0.02)
    train(*load(config, *float8, "train.recompute=true", f"output_dir={tmp_path / 'again'}"))
    assert losses(tmp_path / "again") == found
    two = ("train.accumulate=1", f"output_dir={tmp_path / 'two'}")
    finish(cli("train", "-c", str(config), "--nproc", "2", *float8, *two))
    # summed in another order, numbers may be rounded to others in float8
    assert losses(tmp_path / "two") == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        "loss=lk_alpha",
        pytest.param("train_head=false", marks=pytest.mark.slow),
        pytest.param("loss=lk_lambda", marks=pytest.mark.slow),
    ],
)
def test_offline_training_gives_what_online_training_gives(
    config: Path, tmp_path: Path, options: str
) -> None:
    option = f"strategy.{options}"
    # bfloat16 states, so that what is stored is what was captured
    train(*load(config, option))
    directory = tmp_path / "capture"
    offline = (f"data.capture_dir={directory}", f"output_dir={tmp_path / 'offline'}", option)
    run_capture(*load(config, *offline))
    train(*load(config, *offline))
    assert losses(tmp_path / "offline") == losses(tmp_path / "run")


@pytest.mark.slow
def test_a_stored_capture_is_verified(config: Path, tmp_path: Path) -> None:
    directory = tmp_path / "capture"
    run, strategy = load(config, f"data.capture_dir={directory}")
    run_capture(run, strategy)
    report = verify_directory(directory, run, strategy, recapture=3)
    assert (report.num_recaptured, report.complete) == (3, True)


@pytest.mark.slow
def test_a_checkpoint_holds_the_draft_vocabulary(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    run, strategy = load(config)
    model: Any = restore(run, strategy, tmp_path / "run").draft.model
    assert model.t2d.sum() == 64
    tokens = model.d2t + torch.arange(64)
    assert torch.equal(tokens, model.t2d.nonzero().squeeze(1))
    assert model.d2t.any()


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(config: Path, tmp_path: Path) -> None:
    train(*load(config, "train.max_steps=3"))
    short = f"output_dir={tmp_path / 'short'}"
    # the schedule depends on the number of steps, so only its first part is run
    constant = ("train.schedule=constant", "train.warmup_ratio=0")
    train(*load(config, *constant, short, "train.max_steps=3"))
    train(*load(config, *constant, short, "train.max_steps=6"))
    train(*load(config, *constant, f"output_dir={tmp_path / 'whole'}"))
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_muon_takes_the_layers_matrices(config: Path, tmp_path: Path) -> None:
    train(*load(config, "train.optimizer=muon", "train.max_steps=12"))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


def test_the_plan_needs_no_weights(config: Path) -> None:
    run, strategy = load(config, "strategy.layers=null")
    plan = yaml.safe_load(plan_run(run, strategy, 1))["plan"]
    assert plan["captures"] == {"layers": [1, 3, 4], "final": "post_norm"}


def test_a_draft_vocabulary_beyond_the_targets_is_refused(config: Path) -> None:
    message = "strategy.draft_vocab_size 32000 is larger than the target's vocabulary of 260"
    with pytest.raises(ConfigError, match=message):
        train(*load(config, "strategy.draft_vocab_size=32000"))


def test_a_capture_of_other_layers_is_refused(config: Path, tmp_path: Path) -> None:
    directory = f"data.capture_dir={tmp_path / 'capture'}"
    run_capture(*load(config, directory))
    with pytest.raises(CaptureError, match="layers"):
        train(*load(config, directory, "strategy.layers=[0,3,5]"))
    assert len(list((tmp_path / "capture").glob("shard-*"))) > 0


@pytest.mark.parametrize("source", ["run", pytest.param("export", marks=pytest.mark.slow)])
def test_a_run_begins_from_other_weights(learned: Path, tmp_path: Path, source: str) -> None:
    config, start = learned, learned.parent / "run"
    first = losses(start)[0]
    if source == "export":
        start = export_checkpoint(start, "hf", tmp_path / "export", force=False)
    begun = (f"train.init_from={start}", f"output_dir={tmp_path / 'begun'}")
    train(*load(config, *begun))
    assert losses(tmp_path / "begun")[0] < 0.95 * first
    # the same command again resumes, and other weights can no longer be the start
    train(*load(config, *begun, "train.max_steps=7"))
    assert len(losses(tmp_path / "begun")) == 7
    with pytest.raises(ConfigError, match=r"already began from .* and would be resumed"):
        train(*load(config, *begun, f"train.init_from={tmp_path}"))
    with pytest.raises(ConfigError, match="already began from new weights"):
        train(*load(config, f"train.init_from={tmp_path}"))


@pytest.mark.slow
def test_a_start_with_another_vocabulary_is_refused(config: Path, tmp_path: Path) -> None:
    train(*load(config))
    start = export_checkpoint(tmp_path / "run", "sglang", tmp_path / "export", force=False)
    begun = (f"train.init_from={start}", f"output_dir={tmp_path / 'begun'}")
    with pytest.raises(CheckpointError, match=r"Try: strategy\.draft_vocab_size=64"):
        train(*load(config, *begun, "strategy.draft_vocab_size=70"))


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_evaluation_is_lossless(
    learned: Path, tmp_path: Path, shape: str, temperature: float
) -> None:
    prompts = write_conversations(tmp_path / "prompts.jsonl", 6, seed=5)
    run, strategy = load(
        learned,
        f"output_dir={tmp_path / 'run'}",
        f"eval.prompts.held={prompts}",
        f"eval.temperature={temperature}",
        "eval.max_new_tokens=40",
        f"strategy.tree_top_k={4 if shape == 'tree' else 1}",
        "strategy.tree_tokens=12",
        "strategy.draft_length=4",
    )
    report = evaluate(run, strategy, restore(run, strategy, learned.parent / "run").draft)
    assert report.lossless is (True if temperature == 0 else None)
    assert report.acceptance_length is not None
    assert report.acceptance_length > 1.02  # the target is random, and so are its answers
    assert report.max_draft_tokens == (12 if shape == "tree" else 4)
    assert len(report.per_position) == (3 if shape == "tree" else 4)  # levels, in a tree


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(config: Path, tmp_path: Path) -> None:
    train(*load(config, "train.batch_size=1", "train.accumulate=4"))
    two = ("train.batch_size=1", "train.accumulate=2", f"output_dir={tmp_path / 'two'}")
    finish(cli("train", "-c", str(config), "--nproc", "2", *two))
    close(losses(tmp_path / "two"), losses(tmp_path / "run"), terms=TERMS, dtype=torch.float32)
