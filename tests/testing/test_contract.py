"""The suite of every strategy: planted faults fail it, each at its point."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core import new
from specforge_core.testing.case import Case
from specforge_core.testing.contract import StrategyContract
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import SECONDS, cli

POINTS = [name for name in vars(StrategyContract) if name.startswith("test_")]
# fault -> (the point that has to fail, what the strategy does instead of the template's)
FAULTS = {
    "another dtype than the spec's": (
        "test_samples_match_the_spec",
        "adapter",
        """
        from specforge_example import specforge_adapter as right
        inner = right(target)
        class Wide:
            spec = inner.spec
            def __call__(self, capture):
                return inner(capture) | {"final": capture.final.float()}
        return Wide()
        """,
    ),
    "weights of the global seed": (
        "test_the_first_weights_do_not_hang_on_the_global_seed",
        "draft",
        """
        draft = right_draft(config, target)
        torch.nn.init.normal_(draft.model.blocks[0].weight)
        return draft
        """,
    ),
    "a metric of the core's": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        "return changed(lambda out: {'metrics': {'loss': out.metrics['accuracy']}})",
    ),
    "a metric that hangs on the data": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        """
        one = Ratio(num=torch.ones(()), den=torch.ones(()))
        return changed(lambda out: {'metrics': {str(float(out.weight)): one}})
        """,
    ),
    "a loss with an axis": (
        "test_outputs_have_the_types_and_names_that_add_up",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum[None]})",
    ),
    "a parameter that nothing uses": (
        "test_every_trained_parameter_gets_a_gradient",
        "draft",
        """
        draft = right_draft(config, target)
        draft.model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
        return draft
        """,
    ),
    "a mean for a sum": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum / out.weight})",
    ),
    "documents that see each other": (
        "test_a_batch_is_the_sum_of_its_samples",
        "train_step",
        """
        def run(draft, batch, ctx):
            one = torch.ones_like(batch["document_ids"])
            return step(draft, batch | {"document_ids": one}, ctx)
        return run
        """,
    ),
    "a division by nothing": (
        "test_nothing_supervised_weighs_nothing",
        "train_step",
        "return changed(lambda out: {'loss_sum': out.loss_sum / out.weight * out.weight})",
    ),
    "everything supervised": (
        "test_nothing_supervised_weighs_nothing",
        "train_step",
        """
        def run(draft, batch, ctx):
            return step(draft, batch | {"loss_mask": torch.ones_like(batch["loss_mask"])}, ctx)
        return run
        """,
    ),
    "more tokens than asked": (
        "test_the_proposer_keeps_to_every_limit",
        "proposer",
        """
        class More(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                return super().propose(last_token, 99, sampling)
        return More(draft)
        """,
    ),
    "a start that remembers": (
        "test_accepting_in_pieces_drafts_as_one_start",
        "proposer",
        """
        class Sums(ChainProposer):
            total = 0
            def accept(self, accepted):
                super().accept(accepted)
                self.state = self.total = self.total + self.state
        return Sums(draft)
        """,
    ),
    "a start that wants two tokens": (
        "test_greedy_answers_are_the_targets_own_behind_one_token_too",
        "proposer",
        """
        class Pairs(ChainProposer):
            def start(self, prefix):
                assert len(prefix.input_ids) > 1
                super().start(prefix)
        return Pairs(draft)
        """,
    ),
    "a proposer that reads the token before": (
        "test_the_proposer_gets_accepted_what_the_step_simulates",
        "proposer",
        """
        class Before(ChainProposer):
            def accept(self, accepted):
                super().accept(accepted)
                self.state = accepted.final[-2] if len(accepted.final) > 1 else self.state
        return Before(draft)
        """,
    ),
    "hits behind a miss that count": (
        "test_the_proposer_gets_accepted_what_the_step_simulates",
        "train_step",
        """
        def metrics(out):
            told = out.metrics["acceptance_length"]
            some = out.metrics["accuracy"]
            more = Ratio(num=told.den + 3 * told.den * some.num / some.den, den=told.den)
            return {"metrics": {**out.metrics, "acceptance_length": more}}
        return changed(metrics)
        """,
    ),
    "a step for float32 alone": (
        "test_a_step_in_bfloat16_is_near_the_one_in_float32",
        "train_step",
        """
        def run(draft, batch, ctx):
            out = step(draft, batch, ctx)
            wide = draft.model.blocks[0].weight.dtype == torch.float32
            return out if wide else dataclasses.replace(out, loss_sum=out.loss_sum * 1.2)
        return run
        """,
    ),
    "probabilities that are none": (
        "test_what_was_drawn_comes_with_its_distribution",
        "proposer",
        """
        class Logits(ChainProposer):
            def propose(self, last_token, max_tokens, sampling):
                tokens = super().propose(last_token, max_tokens, sampling).tokens
                return Proposal(tokens=tokens, probs=torch.ones(len(tokens), 260))
        return Logits(draft)
        """,
    ),
    "an import that turns weights around": (
        "test_an_export_loads_as_what_was_exported",
        "import",
        """
        with torch.no_grad():
            for name, parameter in draft.model.named_parameters():
                parameter.copy_(export.weights[name].T)
        return True
        """,
    ),
    "an import that takes any shape": (
        "test_an_export_loads_as_what_was_exported",
        "import",
        "draft.model.load_state_dict(dict(export.weights), strict=False); return True",
    ),
    "state that no checkpoint holds": (
        "test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not",
        "train_step",
        """
        calls = []
        def grow(out):
            calls.append(1)
            return {"loss_sum": out.loss_sum * (1 if len(calls) < 3 else -1)}
        return changed(grow)
        """,
    ),
}
SOURCE = """
import dataclasses
import torch
from specforge_core import hookimpl
from specforge_core.types import Proposal, Ratio
from specforge_example import *
from specforge_example import ChainProposer, ChainStep
from specforge_example import specforge_draft as right_draft
step = ChainStep(3)

def changed(change):
    def run(draft, batch, ctx):
        out = step(draft, batch, ctx)
        return dataclasses.replace(out, **change(out))
    return run

@hookimpl
def specforge_{hook}({arguments}):
{body}
"""
ARGUMENTS = {
    "adapter": "target",
    "draft": "config, target",
    "train_step": "config",
    "proposer": "draft",
    "import": "draft, export",
}


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
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_point(point, case, tmp_path)


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
    process = cli("check", "faulty", "--deep", "strategy.draft_tokens=3")
    out, err = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 1
    assert "hooks: " in out
    failed = {line.split("::")[-1].split()[0] for line in out.splitlines() if "FAILED" in line}
    assert "test_a_batch_is_the_sum_of_its_samples" in failed
    assert "test_the_proposer_keeps_to_every_limit" not in failed
    assert "strategy 'faulty' does not pass the suite of every strategy" in err
