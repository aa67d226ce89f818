"""What a hook returned is called in a run; what goes wrong in it names the package and the hook."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from specforge_core import process, stop
from specforge_core.cli import cli as cli_group
from specforge_core.errors import PluginError
from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import load, write_run
from specforge_core.train.run import train

from .bad_package import BASE

# what a hook returned is called while training; (hook, body, message)
CALLABLES = {
    "a step that raises": (
        ("train_step", "", "return lambda draft, batch, ctx: batch['absent']"),
        "specforge-bad 0.1.0, specforge_train_step: KeyError: 'absent'",
    ),
    "a step that returns a tensor": (
        ("train_step", "", "return lambda draft, batch, ctx: torch.zeros(())"),
        "specforge-bad 0.1.0, specforge_train_step: returned Tensor, expected StepOutput",
    ),
    "a step that exits": (
        ("train_step", "", "return lambda draft, batch, ctx: exit(0)"),
        "specforge-bad 0.1.0, specforge_train_step: SystemExit: 0",
    ),
    "a step that misses a file": (
        ("train_step", "", "return lambda draft, batch, ctx: open('/absent/file')"),
        "specforge-bad 0.1.0, specforge_train_step: FileNotFoundError: ",
    ),
    "a loss of three": (
        ("train_step", "", "return out_of(lambda o: replace(o, loss_sum=o.loss_sum.expand(3)))"),
        "specforge_train_step: returned a loss_sum of shape [3], expected a tensor without axes",
    ),
    "a loss that is a number": (
        ("train_step", "", "return out_of(lambda o: replace(o, loss_sum=0.5))"),
        "specforge_train_step: returned a loss_sum 0.5, expected a tensor without axes",
    ),
    "a loss without a gradient": (
        ("train_step", "", "return out_of(lambda o: replace(o, loss_sum=o.loss_sum.detach()))"),
        "specforge_train_step: returned a loss_sum without a gradient",
    ),
    "a weight below 0": (
        ("train_step", "", "return out_of(lambda o: replace(o, weight=-o.weight))"),
        "specforge-bad 0.1.0, specforge_train_step: the weights of a step come to -",
    ),
    "a metric that is no ratio": (
        ("train_step", "", "return out_of(lambda o: replace(o, metrics={'mine': 3}))"),
        "specforge_train_step: returned the metric 'mine' as int, expected a Ratio, whose num",
    ),
    "a metric that is a tensor": (
        ("train_step", "", "return out_of(lambda o: replace(o, metrics={'mine': o.weight}))"),
        "specforge_train_step: returned the metric 'mine' as Tensor, expected a Ratio, whose num",
    ),
    "a ratio of numbers": (
        (
            "train_step",
            "",
            "return out_of(lambda o: replace(o, metrics=dict(m=Ratio(num=3, den=1))))",
        ),
        "specforge_train_step: returned a m.num 3, expected a tensor without axes",
    ),
    "no metrics at all": (
        ("train_step", "", "return out_of(lambda o: replace(o, metrics=None))"),
        "specforge_train_step: returned the metrics None, expected a Ratio by name",
    ),
    "a metric whose name is a number": (
        ("train_step", "", "return named(5)"),
        "specforge_train_step: returned the metrics {5: Ratio(",
    ),
    "a loss of complex numbers": (
        ("train_step", "", "return out_of(lambda o: replace(o, loss_sum=o.loss_sum * 1j))"),
        "specforge_train_step: returned a loss_sum of complex numbers, expected a real one",
    ),
    "a weight without data": (
        ("train_step", "", "return out_of(lambda o: replace(o, weight=o.weight.to('meta')))"),
        "specforge_train_step: returned a weight on the meta device, expected a number",
    ),
    "a step that raises what is no Exception": (
        ("train_step", "", "return lambda draft, batch, ctx: odd()"),
        "specforge-bad 0.1.0, specforge_train_step: Odd: mine",
    ),
    "a transform that returns a number": (
        ("transform", "", "return lambda sample, generator: 5"),
        "specforge_transform: returned int, expected a dict of tensors",
    ),
    "a collate that returns nothing": (
        ("collate", "", "return lambda samples: None"),
        "specforge_collate: returned NoneType, expected a dict of tensors",
    ),
    "a metric of the core's": (
        ("train_step", "", "return named('loss')"),
        "specforge-bad 0.1.0, specforge_train_step: the metric name 'loss' is the core's own",
    ),
    "a metric of a reserved prefix": (
        ("train_step", "", "return named('seconds_mine')"),
        "the metric name 'seconds_mine' is the core's own",
    ),
    "a metric that comes and goes": (
        ("train_step", "", "return lambda d, b, ctx: named(f'at_{ctx.step}')(d, b, ctx)"),
        "specforge_train_step: its metrics were ['at_0'], and now are ['at_1']",
    ),
    "a transform that raises": (
        ("transform", "", "return lambda sample, generator: sample['absent']"),
        "specforge-bad 0.1.0, specforge_transform: KeyError: 'absent'",
    ),
    "a collate that raises": (
        ("collate", "", "return lambda samples: samples[99]"),
        "specforge-bad 0.1.0, specforge_collate: IndexError: list index out of range",
    ),
    "a collate that returns a list": (
        ("collate", "", "return list"),
        "specforge_collate: returned list, expected a dict of tensors",
    ),
    "a batch of lists": (
        ("collate", "", "return lambda samples: {'hidden': [1]}"),
        "specforge_collate: returned a dict with 'hidden': list, expected tensors by name",
    ),
    "a loss of no parameter": (
        ("train_step", "", "return out_of(lambda o: replace(o, loss_sum=alone()))"),
        "specforge_train_step: no trained parameter got a gradient. Compute the loss from what",
    ),
    "a metric without a name": (
        ("train_step", "", "return named(' ')"),
        "specforge_train_step: returned the metrics {' ': Ratio(",
    ),
    "an adapter that returns a list": (
        ("adapter", "", "return Returns(SPEC)"),
        "specforge-bad 0.1.0, specforge_adapter: returned list, expected a dict of tensors",
    ),
    "an adapter that raises": (
        ("adapter", "config, target", "return Raises(LinearAdapter(SPEC))"),
        "specforge-bad 0.1.0, specforge_adapter: ValueError: no states",
    ),
    "an optimizer whose step raises": (
        ("optimizers", "draft", "return [Worn(draft.model.parameters())]"),
        "specforge-bad 0.1.0, specforge_optimizers: ArithmeticError: worn out",
    ),
    "an optimizer without a state": (
        ("optimizers", "draft", "return [Lost(draft.model.parameters())]"),
        "specforge-bad 0.1.0, specforge_optimizers: KeyError: 'momentum'",
    ),
    "torch's own optimizer, misused": (
        (
            "optimizers",
            "draft",
            "return [without_momentum(torch.optim.SGD(draft.model.parameters()))]",
        ),
        "specforge-bad 0.1.0, specforge_optimizers: KeyError: 'momentum'",
    ),
}
HELPERS = """
from dataclasses import replace
from specforge_core.types import CaptureSpec, Field

def out_of(change):
    return lambda draft, batch, ctx: change(step(draft, batch, ctx))

def named(name):
    def run(draft, batch, ctx):
        out = step(draft, batch, ctx)
        one = torch.ones(())
        return StepOutput(
            loss_sum=out.loss_sum, weight=out.weight, metrics={name: Ratio(num=one, den=one)}
        )
    return run

SPEC = CaptureSpec(layers=(1,), fields={
    "input_ids": Field(shape=(None,), dtype="int64"),
    "loss_mask": Field(shape=(None,), dtype="int64"),
    "hidden": Field(shape=(None, 32), dtype="bfloat16"),
})

def alone():
    return torch.ones((), requires_grad=True)

class Returns(LinearAdapter):
    def __call__(self, capture):
        return list(super().__call__(capture).values())

class Worn(torch.optim.SGD):
    def step(self, closure=None):
        raise ArithmeticError("worn out")

class Lost(torch.optim.SGD):
    def state_dict(self):
        raise KeyError("momentum")

def without_momentum(optimizer):
    del optimizer.param_groups[0]["momentum"]
    return optimizer

class Raises:
    def __init__(self, inner):
        self.spec = inner.spec
    def __call__(self, capture):
        raise ValueError("no states")
"""


def write(site: FakeSite, tmp_path: Path, target: Path, hook: tuple[str, str, str]) -> Path:
    name, arguments, body = hook
    source = f"{BASE}{HELPERS}\n@hookimpl\ndef specforge_{name}({arguments}):\n    {body}\n"
    site.strategy("bad", source)
    settings = {"max_steps": 2, "log_every": 1}
    strategy = {"name": "bad"}
    return write_run(tmp_path, target, conversations=6, strategy=strategy, train=settings)


@pytest.mark.parametrize("case", CALLABLES)
def test_what_a_hook_returned_names_its_package_when_it_fails(
    fake_site: FakeSite, tmp_path: Path, toy_target: Path, case: str
) -> None:
    hook, message = CALLABLES[case]
    config = write(fake_site, tmp_path, toy_target, hook)
    with pytest.raises(PluginError) as error:
        train(*load(config))
    assert message in str(error.value)


def test_an_exit_that_no_command_asked_for_is_an_error(
    fake_site: FakeSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
from specforge_core.config import StrategyConfig
from pydantic import model_validator
class Leaves(StrategyConfig):
    layers: int = 1
    @model_validator(mode="after")
    def leave(self): exit(0)
@hookimpl
def specforge_config(): return Leaves
"""
    fake_site.strategy("bad", BASE + source)
    monkeypatch.setattr(stop, "_state", stop._State())
    monkeypatch.setattr(sys, "argv", ["specforge", "check", "bad", "--deep", "strategy.layers=2"])
    assert process._run(cli_group) == 2
    said = "error: specforge-bad 0.1.0, specforge_config: SystemExit: 0\n"
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "status", "told"),
    [
        (("adapter", "", "import sys; sys.exit(0)"), 2, "specforge_adapter: SystemExit: 0"),
        (("train_step", "", "return lambda d, b, c: 1 / 0"), 1, "specforge_train_step: ZeroDivis"),
        (("train_step", "", "return 5"), 2, "specforge_train_step: returned int, expected a func"),
    ],
)
def test_the_command_s_status_says_whether_the_run_had_begun(
    fake_site: FakeSite,
    tmp_path: Path,
    toy_target: Path,
    hook: tuple[str, str, str],
    status: int,
    told: str,
) -> None:
    config = write(fake_site, tmp_path, toy_target, hook)
    env = os.environ | {"PYTHONPATH": str(fake_site.path)}
    done = run("train", "-c", str(config), env=env)
    assert done.returncode == status
    assert f"error: specforge-bad 0.1.0, {told}" in done.stderr
    assert "--debug" not in done.stderr


@pytest.mark.slow
def test_metric_names_that_hang_on_the_rank_end_all_ranks(
    fake_site: FakeSite, tmp_path: Path, toy_target: Path
) -> None:
    body = "return lambda d, b, ctx: named(f'of_{torch.distributed.get_rank()}')(d, b, ctx)"
    config = write(fake_site, tmp_path, toy_target, ("train_step", "", body))
    env = os.environ | {"PYTHONPATH": str(fake_site.path)}
    done = run("train", "-c", str(config), "--nproc", "2", env=env)
    assert done.returncode != 0
    said = "rank 0 has the metrics ['of_0'], rank 1 ['of_1']"
    assert f"error: specforge-bad 0.1.0, specforge_train_step: {said}" in done.stderr
    assert done.stderr.count(said) == 1  # one message of all ranks
