"""Data that grows while it is trained on: which rows an epoch has, however the run was cut up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from specforge_core.data.shares import Shares
from specforge_core.data.sources import read_conversations
from specforge_core.data.split import training_side
from specforge_core.drafts.checkpoint import checkpoints, find, read_state
from specforge_core.errors import CheckpointError, ConfigError, DataError, RunError
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing import forked
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import finish, lines, load
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train
from specforge_core.train.trainer import Trainer

from ..runs import linear_run
from .growing import EPOCHS, GROWS, HELD, Whole, answers, same, trained, watched

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, toy_target: Path) -> Path:
    folder = tmp_path_factory.mktemp("grows")
    path = linear_run(folder, toy_target)
    prompts = write_conversations(folder / "prompts.jsonl", 10, seed=1)
    path.write_text(path.read_text() + f"regenerate: {{prompts: [{prompts}]}}\n")
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Whole:
    return watched(config)


@pytest.mark.slow
def test_what_is_answered_in_one_epoch_is_trained_on_from_the_next_on(whole: Whole) -> None:
    first, second, third = whole.seen
    assert sorted(first) == list(range(20))
    assert sorted(second) == list(range(26))
    assert len(third) == len(set(third)) == 16  # where the run ends
    assert set(third) & set(range(26, 30))
    files = answers(whole.out)
    assert sorted(files) == [
        f"{first:08d}-{last:08d}.jsonl" for first, last in ((0, 3), (3, 6), (6, 9), (9, 10))
    ]
    rows = [json.loads(line) for name in sorted(files) for line in files[name].splitlines()]
    tokens = [one["input_ids"] for row in rows for one in row["token_rows"]]
    assert [whole.prompts[20 + i].input_ids.tolist() for i in range(10)] == tokens
    told = "epoch 1 begins after step 5: 26 rows, 6 of them new; 4 prompts are left to be answered"
    assert told in whole.said


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_is_the_same(
    config: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an epoch, while answers are waited for, and right behind a share's step."""
    cut = (*GROWS, f"output_dir={tmp_path / 'cut'}")
    settle = Trainer._settle

    def waiting(self: Shares, seconds: float) -> bool:
        if seconds:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Shares, "wait", waiting)
        assert train(*load(config, *cut)).step == 5
    state = read_state(find(tmp_path / "cut")).grown
    assert state is not None
    assert (state.epoch, state.asked, state.files) == (0, [(0, 3), (3, 6)], {})

    def stopping(self: Trainer, queue: Any) -> None:
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        settle(self, queue)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_settle", stopping)
        assert not train(*load(config, *cut)).finished
    assert 8 <= read_state(find(tmp_path / "cut")).step <= 9
    assert train(*load(config, *cut)).finished
    assert same(whole.out, tmp_path / "cut")


@pytest.mark.slow
def test_a_target_that_does_not_answer_ends_the_run_and_costs_no_row(
    config: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    options = (*GROWS, f"output_dir={out}")

    def failing(*_: object) -> None:
        raise CheckpointError("no answer today")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", failing)
        with pytest.raises(RunError, match="regenerate_every: the answers did not come: no ans"):
            train(*load(config, *options))
    assert read_state(find(out)).step == 3  # it is told of where answers are asked for again
    train(*load(config, *options))
    assert same(whole.out, out)


@pytest.mark.slow
def test_nothing_that_is_held_out_is_answered(config: Path, tmp_path: Path) -> None:
    data = str(config.parent / "train.jsonl")
    options = (*GROWS, "data.validation=0.4", "train.max_steps=4", f"regenerate.prompts=[{data}]")
    run, strategy = load(config, *options, "train.regenerate_prompts=100", f"output_dir={tmp_path}")
    train(run, strategy)
    (file,) = answers(tmp_path).values()
    asked = {json.loads(line)["messages"][0]["content"] for line in file.splitlines()}
    side = training_side(run.data, strategy.conversations)
    assert side is not None
    found = list(read_conversations([data], run.data, strategy.conversations))
    assert asked == {one.messages[0]["content"] for one in found if side.takes(one)}
    assert len(asked) < len({one.messages[0]["content"] for one in found})


def test_a_file_that_changed_is_refused(config: Path, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "run", symlinks=True)
    path = min((tmp_path / "run" / "regenerated").iterdir())
    path.write_text(path.read_text().replace("token_rows", "tokens_row", 1))
    with pytest.raises(CheckpointError, match="not as it was when the checkpoint was saved"):
        train(*load(config, *GROWS, "train.max_steps=20", f"output_dir={tmp_path / 'run'}"))


@pytest.mark.slow
def test_answers_that_no_checkpoint_has_are_written_again_where_they_are_of_another_run(
    config: Path, whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole.out / "regenerated", tmp_path / "regenerated")
    before = answers(tmp_path)
    other = ("train.max_steps=6", "regenerate.seed=7", f"output_dir={tmp_path}")
    train(*load(config, *GROWS, *other))
    after = answers(tmp_path)
    assert [name for name in sorted(after) if before[name] == after[name]] == sorted(after)[2:]
    rows = [json.loads(line) for name in sorted(after)[:2] for line in after[name].splitlines()]
    assert {row["sampling"]["seed"] for row in rows} == {7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("regenerate.prompts=[]",), "train.regenerate_every needs regenerate.prompts"),
        (("train.max_steps=null",), "train.regenerate_every needs train.max_steps"),
        (("data.capture_dir=captured",), "needs the target, which is not run with data.capture"),
        (("train.regenerate_every=0",), "greater than 0"),
    ],
)
def test_what_cannot_grow_is_an_error(
    config: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(config, *GROWS, *overrides)


def test_a_run_grows_from_its_first_step_on_or_never(config: Path, whole: Whole) -> None:
    with pytest.raises(CheckpointError, match=r"was trained with train\.regenerate_every=2, this "):
        train(*load(config, *GROWS, "train.regenerate_every=null"))
    # how often, and how many, may change
    changed = ("train.regenerate_every=3", "train.regenerate_prompts=5")
    assert train(*load(config, *GROWS, *changed)).finished


@pytest.mark.slow
def test_two_ranks_train_on_the_same(config: Path, whole: Whole, tmp_path: Path) -> None:
    two = (*GROWS, f"output_dir={tmp_path / 'two'}", "train.batch_size=1", "train.max_steps=8")
    finish(forked.cli("train", "-c", str(config), "--nproc", "2", *two))
    files, found = answers(whole.out), answers(tmp_path / "two")
    assert len(found) >= 2  # of the second epoch; those asked for in it may not be answered
    assert found.items() <= files.items()
    one, other = trained(whole.out)[:8], trained(tmp_path / "two")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in other]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-4)


SLOW = """
    import time
    from specforge_core import hookimpl
    from specforge_core.target.engine import TransformersEngine

    class Slow(TransformersEngine):
        # captures run the decoder alone, and are as fast as ever
        @classmethod
        def load(cls, target, device):
            engine = super().load(target, device)
            engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
            return engine

    @hookimpl
    def specforge_target_engine(target, device):
        return Slow.load(target, device) if target.engine == "slow" else None
"""


@pytest.mark.slow
def test_no_rank_waits_for_a_batch_of_answers(
    config: Path, fake_site: FakeSite, tmp_path: Path
) -> None:
    """The first rank's target answers; where all wait for that, NCCL gives up after 600 s."""
    group = {"specforge.plugins": {"slow": "slow_engine"}}
    fake_site.dist("slow-engine", "0.1.0", group, module="slow_engine", source=SLOW)
    slow = ("regenerate.batch_size=10", "regenerate.max_new_tokens=160", "target.engine=slow")
    options = (*GROWS, *slow, "train.regenerate_prompts=10", "train.max_steps=11")
    two = (f"output_dir={tmp_path / 'two'}", "train.batch_size=1", "train.accumulate=1")
    env = {**os.environ, "PYTHONPATH": str(fake_site.path)}
    finish(forked.cli("train", "-c", str(config), "--nproc", "2", *options, *two, env=env))
    rows = lines(tmp_path / "two")
    took = [b["seconds"] - a["seconds"] for a, b in pairwise(rows)]
    (file,) = answers(tmp_path / "two").values()
    assert len(file.splitlines()) == 10
    # the ten steps of the epoch, of which the last eight have the batch of 8 s beside them
    assert max(took[:9]) < 7


@pytest.mark.slow
def test_kills_at_any_time_change_nothing(
    config: Path, whole: Whole, fake_site: FakeSite, tmp_path: Path
) -> None:
    fake_site.strategy("held", HELD)
    every = (*GROWS, "train.save_every=2", "train.keep=1", "strategy.name=held")
    out = tmp_path / "cut"
    cut = ("train", "-c", str(config), *every, f"output_dir={out}")
    for number in range(100):
        done = len(checkpoints(out)) and read_state(find(out)).step
        site = {"PYTHONPATH": str(fake_site.path), "HELD_AT": str(done + 6)}
        process = forked.cli(*cut, env=os.environ | site)
        while process.poll() is None:
            here = checkpoints(out)
            with suppress(CheckpointError):  # the next one takes its place
                if here and read_state(here[-1]).step >= done + 4:
                    time.sleep(0.01 * (number % 5))
                    process.kill()
            time.sleep(0.002)
        process.communicate()
        if process.returncode == 0:
            break
    assert number >= 2
    assert same(whole.out, out)


def test_a_run_goes_on_only_with_the_prompts_that_it_has_answered(
    config: Path, whole: Whole, tmp_path: Path
) -> None:
    """Others behind them are welcome; in front, or instead, some would be answered twice."""
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    own = config.parent / "prompts.jsonl"
    more = write_conversations(tmp_path / "more.jsonl", 4, seed=2)
    options = (*GROWS, f"output_dir={out}", "train.max_steps=17", "train.save_every=100")
    before = {path.name: path.read_bytes() for path in (out / "regenerated").iterdir()}
    for others in (f"[{more},{own}]", f"[{more}]"):
        with pytest.raises(CheckpointError, match="the first 10 prompts of"):
            train(*load(config, *options, f"regenerate.prompts={others}"))
    assert {path.name: path.read_bytes() for path in (out / "regenerated").iterdir()} == before
    assert train(*load(config, *options, f"regenerate.prompts=[{own},{more}]")).step == 17


def test_answers_are_not_waited_for_beyond_the_time_of_a_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shares, "_answer", lambda self, share: self._closed.wait(60))
    out = tmp_path / "run"
    began = time.monotonic()
    report = train(*load(config, *GROWS, f"output_dir={out}", "train.max_minutes=0.04"))
    assert time.monotonic() - began < 40
    assert report.step == EPOCHS[0]  # the first epoch; the next waits for answers
    assert report.finished


def test_prompts_that_are_all_held_out_are_named_so(config: Path, tmp_path: Path) -> None:
    held = config.parent / "prompts.jsonl"
    options = (*GROWS, f"output_dir={tmp_path / 'run'}", f"data.validation=[{held}]")
    with pytest.raises(DataError, match="holds out all 10 conversations"):
        train(*load(config, *options))
