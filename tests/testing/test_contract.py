"""The suite of every strategy: planted faults fail it, each at its point."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core import new
from specforge_core.errors import PluginError
from specforge_core.testing.case import Case
from specforge_core.testing.contract import StrategyContract
from specforge_core.testing.edges import silenced
from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite

from .faults import ARGUMENTS, FAULTS, SOURCE

POINTS = [name for name in vars(StrategyContract) if name.startswith("test_")]


class Faulty(StrategyContract):
    strategy = {"name": "faulty"}  # noqa: RUF012
    other_shape = {"draft_tokens": 2}  # noqa: RUF012


def run_point(point: str, case: Case, tmp_path: Path) -> None:
    method: Callable[..., None] = getattr(Faulty(), point)
    given: dict[str, Any] = {"case": case, "tmp_path": tmp_path}
    method(**{name: given[name] for name in inspect.signature(method).parameters})


@pytest.fixture
def template(fake_site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> FakeSite:
    monkeypatch.syspath_prepend(str(new.TEMPLATES / "method"))
    return fake_site


def add(site: FakeSite, hook: str, body: str) -> None:
    indented = "\n".join(f"    {line}" for line in inspect.cleandoc(body).splitlines())
    site.strategy("faulty", SOURCE.format(hook=hook, arguments=ARGUMENTS[hook], body=indented))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_at_its_point(
    template: FakeSite, toy_target: Path, tmp_path: Path, fault: str
) -> None:
    point, hook, body = FAULTS[fault]
    add(template, hook, body)
    case = Case.open(Faulty.strategy, toy_target, tmp_path)
    with pytest.raises((AssertionError, pytest.fail.Exception, PluginError)):
        run_point(point, case, tmp_path)


def test_a_strategy_that_turns_silence_down_is_silenced_behind_its_transform(
    template: FakeSite, toy_target: Path, tmp_path: Path
) -> None:
    body = """
        from specforge_example import specforge_adapter as right
        inner = right(target)
        class Loud:
            spec = inner.spec
            def __call__(self, capture):
                return inner(capture) if capture.loss_mask.any() else None
        return Loud()
        """
    add(template, "adapter", body)
    case = Case.open(Faulty.strategy, toy_target, tmp_path)
    sample = silenced(case, case.captures[0])
    assert sample is not None
    assert not sample["loss_mask"].any()
    assert float(case.step([sample]).weight) == 0


@pytest.mark.slow
def test_without_a_fault_the_same_strategy_passes_every_point(
    template: FakeSite, toy_target: Path, tmp_path: Path
) -> None:
    body = """
        right = ChainStep(config.draft_tokens)
        def run(draft, batch, ctx):  # a schedule over the steps of the run is allowed
            out = right(draft, batch, ctx)
            left = 1 - ctx.step / ctx.total_steps
            return dataclasses.replace(out, loss_sum=out.loss_sum * left)
        return run
        """
    add(template, "train_step", body)
    case = Case.open(Faulty.strategy, toy_target, tmp_path)
    for point in POINTS:
        if point != "test_one_rank_two_ranks_and_accumulation_train_alike":  # starts processes
            case.draft.model.zero_grad()
            run_point(point, case, tmp_path)


def test_every_point_but_that_of_processes_has_a_fault() -> None:
    processes = "test_one_rank_two_ranks_and_accumulation_train_alike"
    assert {point for point, _, _ in FAULTS.values()} | {processes} == set(POINTS)


@pytest.mark.slow
def test_check_deep_runs_the_suite_on_an_installed_strategy(
    template: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(template, "train_step", FAULTS["a mean for a sum"][2])
    path = (str(template.path), str(new.TEMPLATES / "method"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    done = run("check", "faulty", "--deep", "strategy.draft_tokens=3")
    assert done.returncode == 1
    assert "hooks: " in done.stdout
    told = done.stdout.splitlines()
    failed = {line.split("::")[-1].split()[0] for line in told if "FAILED" in line}
    assert "test_a_batch_is_the_sum_of_its_samples" in failed
    assert "test_the_proposer_keeps_to_every_limit" not in failed
    assert "strategy 'faulty' does not pass the suite of every strategy" in done.stderr
