"""The suite that proves a strategy: subclass `StrategyContract` in its package's tests.

    class TestContract(StrategyContract):
        strategy = {"name": "mine"}
        other_shape = {"draft_tokens": 2}  # options of a draft that has other tensors

`specforge check NAME --deep` runs it too.  Everything is done with a toy target on a CPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from .. import plugins
from ..batches.collate import num_tokens
from ..capture.layout import check_sample
from ..capture.samples import to_host
from ..compiled import recompute_units
from ..drafts.checkpoint import checkpoints
from ..drafts.export import read_export, write_export
from ..drafts.load import restore
from ..errors import SpecForgeError
from ..evaluate.decode import pick
from ..train.fsdp import cast_inputs
from ..train.metrics import RESERVED_PREFIXES
from ..train.run import train
from ..types import (
    RESERVED_METRICS,
    Proposal,
    Proposer,
    Ratio,
    Sampling,
    StepOutput,
    TargetCapture,
)
from . import acceptance, drawn, forked, runs
from .case import Case
from .edges import edge_samples, silenced, stepped
from .float8 import check_float8
from .greedy import check_greedy
from .predictable import save_predictable_target
from .runs import finish, load, losses

# ranks are forked where that is known to work; elsewhere each starts Python and imports
_cli: Any = forked.cli if sys.platform == "linux" else runs.cli


class StrategyContract:
    """What every strategy has to do; one test for each point."""

    strategy: ClassVar[Mapping[str, Any]]
    other_shape: ClassVar[Mapping[str, Any] | None] = None
    format: ClassVar[str] = "hf"
    learning_rate: ClassVar[float] = 0.01  # with which the draft learns a few short answers

    @pytest.fixture
    def case(self, toy_target: Path, tmp_path: Path) -> Case:
        """Return a case of this strategy."""
        return Case.open(self.strategy, toy_target, tmp_path)

    def test_samples_match_the_spec(self, case: Case) -> None:
        spec, vocabulary = case.job.adapter.spec, case.job.target.vocab_size
        for capture in case.captures:
            stored = case.job.adapter(capture)
            if stored is not None:
                assert check_sample(spec, vocabulary, to_host(capture.index, stored)) == []

    def test_the_first_weights_do_not_hang_on_the_global_seed(self, case: Case) -> None:
        found: list[dict[str, Tensor]] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(case.new_draft(case.job, case.data).model.state_dict())
        _equal(found[0], found[1])

    def test_outputs_have_the_types_and_names_that_add_up(self, case: Case) -> None:
        outputs = [case.step([sample]) for sample in case.samples]
        for output in outputs:
            assert isinstance(output, StepOutput)
            assert output.loss_sum.shape == output.weight.shape == ()
            assert sorted(output.metrics) == sorted(outputs[0].metrics)
            for name, ratio in output.metrics.items():
                assert isinstance(ratio, Ratio)
                assert ratio.num.shape == ratio.den.shape == ()
                assert name not in RESERVED_METRICS
                assert not name.startswith(RESERVED_PREFIXES)

    def test_every_trained_parameter_gets_a_gradient(self, case: Case) -> None:
        """The same one where the draft's units are recomputed in the backward pass."""
        found: list[dict[str, Tensor]] = []
        for recompute in (False, True):
            if recompute:
                recompute_units(case.draft.compiled)
            case.draft.model.zero_grad()
            loss = case.step(case.samples).loss_sum
            torch.autograd.backward(loss)
            trained = [(n, p) for n, p in case.draft.model.named_parameters() if p.requires_grad]
            without = [name for name, p in trained if p.grad is None or not p.grad.any()]
            assert not without, "freeze them or use them"
            gradients = {name: p.grad for name, p in trained if p.grad is not None}
            found.append({"loss": loss.detach(), **gradients})
        _equal(found[0], found[1])

    def test_a_batch_is_the_sum_of_its_samples(self, case: Case) -> None:
        """Also of samples of few tokens, of answers of one, and with every token supervised."""
        usual = {f"sample {i}": sample for i, sample in enumerate(case.samples)}
        for samples in (usual, edge_samples(case)):
            whole, gradients = stepped(case, list(samples.values()), "all")
            parts = [stepped(case, [sample], name) for name, sample in samples.items()]
            _close(whole.loss_sum, sum(part.loss_sum for part, _ in parts))
            _close(whole.weight, sum(part.weight for part, _ in parts))
            for name, ratio in whole.metrics.items():
                _close(ratio.num, sum(part.metrics[name].num for part, _ in parts))
                _close(ratio.den, sum(part.metrics[name].den for part, _ in parts))
            for name, gradient in gradients.items():
                apart = sum((found[name] for _, found in parts), -gradient)
                # of the whole: where parts cancel each other, rounding is all that an element has
                assert apart.norm() <= 1e-4 * gradient.norm(), f"gradient of {name}"

    def test_nothing_supervised_weighs_nothing(self, case: Case) -> None:
        for capture in case.captures[:2]:
            if (sample := silenced(case, capture)) is None:
                continue
            output, gradients = stepped(case, [sample], "nothing supervised")
            assert output.loss_sum == 0
            tokens = num_tokens(sample, case.job.adapter.spec)
            assert output.weight.item() in (0, tokens), "neither nothing nor a mean over tokens"
            assert not [name for name, gradient in gradients.items() if gradient.any()]

    @pytest.mark.slow
    def test_one_rank_two_ranks_and_accumulation_train_alike(self, case: Case) -> None:
        found: list[list[float]] = []
        for nproc, batch_size, accumulate in ((1, 4, 1), (1, 1, 4), (2, 1, 2)):
            out = case.config.parent / f"alike-{len(found)}"
            sizes = (f"train.batch_size={batch_size}", f"train.accumulate={accumulate}")
            options = (*sizes, f"output_dir={out}")
            if nproc == 1:
                train(*load(case.config, *options))
            else:
                finish(_cli("train", "-c", str(case.config), "--nproc", str(nproc), *options))
            found.append(losses(out))
        assert found[1] == pytest.approx(found[0], rel=1e-4)
        assert found[2] == pytest.approx(found[0], rel=1e-4)

    def test_the_proposer_keeps_to_every_limit(self, case: Case) -> None:
        proposer = case.proposer()
        assert proposer.max_tokens > 0
        for limit in range(1, proposer.max_tokens + 1):
            proposal = _draft(proposer, case.captures[0], limit)
            assert 0 < _depth(proposal) <= limit
            assert proposal.tokens.dtype == torch.int64
            assert proposal.tokens.min() >= 0
            assert proposal.tokens.max() < case.job.target.vocab_size

    def test_accepting_in_pieces_drafts_as_one_start(self, case: Case) -> None:
        proposer, capture = case.proposer(), case.captures[0]
        whole = _draft(proposer, capture, proposer.max_tokens)
        _draft(proposer, case.captures[1], proposer.max_tokens)  # start forgets this one
        end = len(capture.input_ids) - 1
        proposer.start(pick(capture, [0], supervised=False))
        done = 1
        for count in (1, 2, end - 4):
            _propose(proposer, int(capture.input_ids[done]), proposer.max_tokens)
            proposer.accept(pick(capture, list(range(done, done + count)), supervised=True))
            done += count
        pieces = _propose(proposer, int(capture.input_ids[-1]), proposer.max_tokens)
        assert pieces.tokens.tolist() == whole.tokens.tolist()

    @pytest.mark.slow
    def test_greedy_answers_are_the_targets_own_behind_one_token_too(self, case: Case) -> None:
        check_greedy(case, case.captures[0].input_ids.tolist())

    @pytest.mark.slow
    def test_the_proposer_gets_accepted_what_the_step_simulates(self, tmp_path: Path) -> None:
        """On a target's own answers, greedily, once the draft has learned a part of them."""
        save_predictable_target(tmp_path / "predictable")
        case = Case.open(self.strategy, tmp_path / "predictable", tmp_path / "own")
        if acceptance.METRIC not in case.step(case.samples).metrics:
            pytest.skip("the step simulates nothing: it has no metric acceptance_length")
        pairs = [(c, s) for c in acceptance.own_answers(case) if (s := case.sample(c)) is not None]
        tokens = acceptance.draft_tokens(case)
        if acceptance.drafted(case.proposer(), pairs[0][0], tokens) is None:
            pytest.skip("trees are drafted, which no step simulates")
        learned = acceptance.learn(case, [sample for _, sample in pairs], self.learning_rate)
        assert learned, "the step says that next to nothing would be accepted, however long trained"
        wanted, found = [0.0, 0.0], [0.0, 0.0]  # accepted tokens, places
        for capture, sample in pairs:
            one = acceptance.drafted(case.proposer(), capture, tokens)
            assert one is not None
            told = acceptance.simulated(case, sample)
            found = [a + b for a, b in zip(found, one, strict=True)]
            wanted = [a + b for a, b in zip(wanted, told, strict=True)]
        assert found[1] == wanted[1], "options with which the step looks at every place are needed"
        # of two tokens that are almost equally likely, either may come first
        assert found[0] == pytest.approx(wanted[0], rel=0.01)
        check_greedy(case, pairs[0][0].input_ids.tolist())  # where tokens are accepted

    def test_a_step_in_bfloat16_is_near_the_one_in_float32(self, case: Case) -> None:
        exact = case.step(case.samples)
        for module in (case.draft.model, case.draft.frozen):
            if module is not None:
                module.to(torch.bfloat16)
        cast_inputs(case.draft.model, torch.bfloat16)
        rounded = case.step(case.samples)
        torch.autograd.backward(rounded.loss_sum)
        torch.testing.assert_close(
            rounded.loss_sum.float(), exact.loss_sum.float(), rtol=0.05, atol=0.05
        )
        for parameter in case.draft.model.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        for temperature in (0.0, 1.0):
            assert _depth(_draft(case.proposer(), case.captures[0], 3, _sampling(temperature))) > 0

    def test_a_step_in_float8_is_near_the_one_in_float32_or_refused(self, case: Case) -> None:
        check_float8(case)

    def test_what_was_drawn_comes_with_its_distribution(self, case: Case) -> None:
        proposer, draws = case.proposer(), [_sampling(0.5, seed) for seed in range(drawn.DRAFTS)]
        drawn.check_drawn([_draft(proposer, case.captures[0], 8, sampling) for sampling in draws])

    def test_an_export_loads_as_what_was_exported(self, case: Case, tmp_path: Path) -> None:
        job = case.job
        strategy, config, target = job.strategy, job.run.strategy, job.target
        if not plugins.implements(strategy.pm, strategy.name, "specforge_import"):
            pytest.skip("the strategy has no specforge_import")
        first = strategy.export(config, case.draft, target, self.format)
        write_export(first, tmp_path / "export", {})
        loaded = case.new_draft(job)
        strategy.load_export(config, loaded, target, read_export(tmp_path / "export"))
        second = strategy.export(config, loaded, target, self.format)
        assert second.config == first.config
        _equal(dict(first.weights), dict(second.weights))
        if self.other_shape is not None:
            other = load(case.config, *self._other())[0]
            draft = strategy.draft(other.strategy, target, None)
            with pytest.raises(SpecForgeError):
                strategy.load_export(
                    other.strategy, draft, target, read_export(tmp_path / "export")
                )

    @pytest.mark.slow
    def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not(self, case: Case) -> None:
        # the config stays the same throughout: a step may hang on how long the run is to be
        run, strategy = load(case.config, "train.save_every=2")
        train(run, strategy)
        one = restore(run, strategy, run.output_dir).draft.model.state_dict()
        _, last = checkpoints(run.output_dir)
        shutil.rmtree(last)  # as if it had been killed after its second step
        train(run, strategy)
        other = restore(run, strategy, run.output_dir).draft.model.state_dict()
        _equal(one, other)
        if self.other_shape is not None:
            with pytest.raises(SpecForgeError):
                train(*load(case.config, *self._other(), "train.max_steps=5"))

    def _other(self) -> Iterator[str]:
        return (f"strategy.{key}={value}" for key, value in (self.other_shape or {}).items())


def _draft(
    proposer: Proposer, capture: TargetCapture, limit: int, sampling: Sampling | None = None
) -> Proposal:
    """Draft behind all but the last token, which the target has not run on."""
    proposer.start(pick(capture, list(range(len(capture.input_ids) - 1)), supervised=False))
    return _propose(proposer, int(capture.input_ids[-1]), limit, sampling)


def _propose(proposer: Proposer, last: int, limit: int, how: Sampling | None = None) -> Proposal:
    return proposer.propose(last, min(limit, proposer.max_tokens), how or _sampling())


def _sampling(temperature: float = 0.0, seed: int = 0) -> Sampling:
    return Sampling(temperature=temperature, generator=torch.Generator().manual_seed(seed))


def _depth(proposal: Proposal) -> int:
    """Return the tokens of the longest path."""
    if proposal.parents is None:
        return len(proposal.tokens)
    depths: list[int] = []
    for parent in proposal.parents.tolist():
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return max(depths, default=0)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs"


def _close(one: Tensor, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, check_dtype=False)
