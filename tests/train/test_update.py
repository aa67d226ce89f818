"""A step whose numbers are not finite changes nothing, and is not saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specforge_core.batches.loader import Micro
from specforge_core.batches.prefetch import Prefetcher
from specforge_core.capture.job import run_capture
from specforge_core.config import TrainConfig
from specforge_core.drafts.checkpoint import checkpoints
from specforge_core.errors import RunError
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import lines, load
from specforge_core.train import run as run_module
from specforge_core.train.dist import world
from specforge_core.train.fsdp import shard
from specforge_core.train.metrics import Reduced, Reducer
from specforge_core.train.optim import build_optimizers, local_gradients, square_norm
from specforge_core.train.run import train
from specforge_core.train.trainer import Launched, Trainer
from specforge_core.train.update import Update
from specforge_core.types import Draft, StepOutput

from ..runs import linear_run

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

# ---- the update itself ----------------------------------------------------------


def everything(model: nn.Module, update: Update) -> dict[str, Tensor]:
    """Return a copy of the weights and of all that the optimizers remember."""
    found = dict(model.named_parameters())
    for number, optimizer in enumerate(update.optimizers):
        for name, param in model.named_parameters():
            state = optimizer.state.get(param, {})
            found |= {f"{number}.{name}.{k}": v for k, v in state.items()}
    return {
        name: (v.to_local() if isinstance(v, DTensor) else v).detach().clone()
        for name, v in found.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


Spoil = Callable[[list[Tensor]], tuple[float, float]]  # the step's loss and weight


def holding(loss: float, weight: float, factor: float = 1.0, last: float | None = None) -> Spoil:
    """Return what gives a step these sums, and its gradients a factor and a last element."""

    def spoil(gradients: list[Tensor]) -> tuple[float, float]:
        torch._foreach_mul_(gradients, factor)
        if last is not None:
            gradients[-1].view(-1)[-1] = last
        return loss, weight

    return spoil


GOOD = holding(2.0, 4.0)
BAD = {
    "loss": holding(nan, 4.0),
    "infinite loss": holding(inf, 4.0),
    "weight": holding(2.0, nan),
    "infinite weight": holding(2.0, inf),
    "nothing supervised": holding(0.0, 0.0),
    "a gradient": holding(2.0, 4.0, last=nan),
    "an infinite gradient": holding(2.0, 4.0, last=-inf),
    "huge gradients": holding(2.0, 4.0, factor=1e38),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_leaves_weights_and_optimizers_as_they_were(optimizer: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Linear(8, 3)).to(DEVICE)
    draft = Draft(model=model, shard=(layer,))
    with world(DEVICE) as world_:
        shard(draft, world_.mesh, torch.float32)
        config = TrainConfig(optimizer=optimizer, weight_decay=0.1, learning_rate=0.01)
        update = Update(build_optimizers(draft, config), 1.0, 1)
        reducer = Reducer("pkg 1", DEVICE)

        def step(spoil: Spoil) -> None:
            model(torch.randn(4, 8, device=DEVICE)).square().sum().backward()
            gradients = local_gradients(model)
            loss, weight = (torch.tensor(v, device=DEVICE) for v in spoil(gradients))
            output = StepOutput(loss_sum=loss, weight=weight)
            update.apply(gradients, reducer.reduce([output], (square_norm(gradients, "mine 1.0"),)))
            assert all(p.grad is None for p in model.parameters())

        start = everything(model, update)
        step(BAD[kind])  # as the first step, too
        assert same(start, {k: v for k, v in everything(model, update).items() if k in start})
        step(GOOD)
        before = everything(model, update)
        assert all(v.isfinite().all() for v in before.values())
        assert not any(torch.equal(start[name], before[name]) for name in start)
        step(BAD[kind])
        assert same(before, everything(model, update))
        step(GOOD)
        after = everything(model, update)
        assert not any(torch.equal(before[name], after[name]) for name in before)


# ---- in a run ------------------------------------------------------------------------

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

ODD = """
    import torch
    from specforge_core import hookimpl
    from specforge_core.types import StepOutput
    import specforge_linear
    from specforge_linear import specforge_adapter, specforge_config, specforge_draft

    class Bad(torch.autograd.Function):  # right forward, and no gradient to use
        @staticmethod
        def forward(ctx, x):
            return x.clone()
        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    @hookimpl
    def specforge_train_step():
        def step(draft, batch, ctx):
            out = specforge_linear.train_step(draft, batch, ctx)
            loss = out.loss_sum
            if ctx.step in STEPS:
                loss = CHANGE
            return StepOutput(loss_sum=loss, weight=out.weight, metrics=METRICS)
        return step
    """


def odd(env: FakeSite, change: str, steps: tuple[int, ...], metrics: str = "out.metrics") -> None:
    code = ODD.replace("CHANGE", change).replace("STEPS", str(steps))
    env.strategy("odd", code.replace("METRICS", metrics))


CHANGES = {
    'loss * float("nan")': "the loss of step",
    "Bad.apply(loss)": "the gradient norm of step",
}


@pytest.fixture(params=[0, 1], ids=["read at once", "read a step later"])
def config(tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Path:
    monkeypatch.setattr(run_module, "steps_ahead", lambda device: request.param)
    return linear_run(tmp_path, toy_target)


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


COMMON = ("target.device=cpu", "strategy.name=odd", "train.save_every=1", "train.keep=9")


@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_step_is_left_out_and_its_samples_are_named(
    config: Path,
    tmp_path: Path,
    env: FakeSite,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    odd(env, change, (2, 3))
    report = train(*load(config, *COMMON, "train.max_bad_steps=2"))
    assert (report.step, report.finished) == (6, True)
    saved = checkpoints(tmp_path / "run")
    assert [path.name[-1] for path in saved] == ["1", "2", "5", "6"]  # none of a bad step
    assert all(v.isfinite().all() for path in saved for v in tensors(path).values())
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ["loss" in row for row in rows] == [True, True, False, False, True, True]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert [CHANGES[change] + f" {step}" in line for step, line in zip((3, 4), said, strict=True)]
    named = [{int(i) for i in line.split("samples: ")[1].split(", ")} for line in said]
    assert [len(ids) for ids in named] == [4, 4]
    assert not named[0] & named[1]


def test_a_run_with_a_bad_step_is_that_without_its_update(
    config: Path, tmp_path: Path, env: FakeSite
) -> None:
    whole = ("train.schedule=constant", "train.warmup_ratio=0", *COMMON)
    odd(env, 'loss * float("nan")', (2,))
    train(*load(config, *whole, "train.max_steps=4"))
    two, four = (tensors(checkpoints(tmp_path / "run")[i]) for i in (1, 2))
    moments = [name for name in two if name.endswith("exp_avg_sq")]
    # three updates in four steps
    steps = {float(v) for k, v in four.items() if k.endswith(".step")}
    assert steps == {3.0}
    assert all(not torch.equal(two[name], four[name]) for name in moments)


def test_a_metric_that_is_no_number_spoils_no_line_and_no_checkpoint_between_two(
    config: Path, tmp_path: Path, env: FakeSite, capsys: pytest.CaptureFixture[str]
) -> None:
    of_none = "{**out.metrics, 'odd': type(out.metrics['accuracy'])(num=loss / 0, den=loss / loss)}"
    odd(env, "loss", (), of_none)
    options = ("target.device=cpu", "strategy.name=odd", "train.log_every=2", "train.max_steps=3")
    train(*load(config, *options))
    train(*load(config, *options, "train.max_steps=4"))  # fills up the window of the first
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    assert all({"loss", "accuracy"} < row.keys() and "odd" not in row for row in rows)
    assert capsys.readouterr().err.count("specforge_train_step: the metric 'odd' came to inf") == 2


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_one_bad_step_too_many_ends_the_run(
    config: Path, tmp_path: Path, env: FakeSite, allowed: int
) -> None:
    odd(env, 'loss * float("nan")', tuple(range(1, 99)))
    options = (f"train.max_bad_steps={allowed}", "train.max_steps=20")
    message = f"the loss of step {2 + allowed} is nan, and train.max_bad_steps={allowed} such"
    with pytest.raises(RunError, match=message):
        train(*load(config, *COMMON, *options))
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_bad_last_step_neither_saves_nor_succeeds(
    config: Path, tmp_path: Path, env: FakeSite, change: str
) -> None:
    odd(env, change, (5,))
    with pytest.raises(RunError, match="step 6, the last one, was left out") as error:
        train(*load(config, *COMMON))
    assert error.value.exit_code == 1
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["1", "2", "3", "4", "5"]
    assert json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_text())["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("value", [inf, nan])
def test_weights_that_are_not_finite_are_not_saved(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    apply, count = Update.apply, iter(range(99))

    def overflowing(self: Update, gradients: list[Tensor], reduced: Reduced) -> None:
        apply(self, gradients, reduced)
        if next(count) == 5:
            weight = self.optimizers[0].param_groups[0]["params"][0].detach()
            weight.to_local()[0, 0] = value

    monkeypatch.setattr(Update, "apply", overflowing)
    with pytest.raises(RunError, match=r"model.weight is not finite after step 6 \(1 of \d"):
        train(*load(config, *COMMON, "strategy.name=linear"))
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["1", "2", "3", "4", "5"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_the_host_waits_for_nothing_before_the_next_step(
    tmp_path: Path, toy_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, count = Trainer._optimizer_step, iter(range(99))

    def strict(self: Trainer, batches: Prefetcher[Micro]) -> Launched:
        if next(count) < 2:  # what is made once may wait
            return launch(self, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_optimizer_step", strict)
    config = linear_run(tmp_path, toy_target)
    options = (f"data.capture_dir={tmp_path / 'capture'}", "train.device=cuda")
    run_capture(*load(config, *options))
    report = train(*load(config, *options, "train.compile=never"))
    assert report.step == 6
    assert next(count) == 6
