"""Prompts answered side by side: the same answers, one set of weights, an end at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from specforge_core.config import EvalConfig
from specforge_core.evaluate.bench import Bench, Desk, EvalPrompt, open_desks
from specforge_core.evaluate.decode import Limits
from specforge_core.evaluate.report import PromptResult
from specforge_core.types import CaptureSpec, Draft, Proposal, Proposer, Sampling, TargetCapture

SPEC = CaptureSpec(layers=(0, 3), fields={})


class Guess:
    """Drafts what a matrix makes of the last state, so that its answers depend on hooks."""

    max_tokens = 3

    def __init__(self, draft: Draft) -> None:
        self.model = draft.model

    def start(self, prefix: TargetCapture) -> None:
        self.last = prefix

    def accept(self, accepted: TargetCapture) -> None:
        self.last = accepted

    def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
        seen = torch.stack([s[-1] for s in self.last.hidden_states.values()]).sum(0)
        first = int(self.model(seen).argmax())
        return Proposal(tokens=torch.tensor([first, last_token, first][:max_tokens]), probs=None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(toy_target: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(toy_target).train(False)


@pytest.fixture
def draft(model: Any) -> Draft:
    torch.manual_seed(0)
    return Draft(model=nn.Linear(model.config.hidden_size, model.config.vocab_size))


def prompts(count: int, vocabulary: int) -> list[EvalPrompt]:
    draw = torch.Generator().manual_seed(3)
    sizes = torch.randint(5, 40, (count,), generator=draw).tolist()
    return [
        EvalPrompt(f"p:{i}", tuple(torch.randint(4, vocabulary, (n,), generator=draw).tolist()))
        for i, n in enumerate(sizes)
    ]


def bench(desks: tuple[Desk, ...], **options: Any) -> Bench:
    return Bench(desks, SPEC, Limits(16, frozenset()), 3, EvalConfig(**options))


def told(results: dict[str, list[PromptResult]]) -> list[Any]:
    return [
        (name, r.where, r.answer.tokens, r.answer.stats.accepted, r.difference)
        for name, found in results.items()
        for r in found
    ]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_how_many_are_decoded_at_once(
    model: Any, draft: Draft, temperature: float, two_threads: None
) -> None:
    sets = {"a": prompts(3, model.config.vocab_size), "b": prompts(1, model.config.vocab_size)}
    desks = open_desks(model, draft, Guess, 7)
    assert len(desks) == 2
    together = bench(desks, temperature=temperature).run_sets(sets)
    alone = bench(desks[:1], temperature=temperature).run_sets(sets)
    assert told(together) == told(alone)
    assert torch.get_num_threads() == 2


def test_desks_share_weights_and_nothing_else(model: Any, draft: Draft, two_threads: None) -> None:
    one, other = open_desks(model, draft, Guess, 9)
    assert one.model is not other.model
    mine, its = dict(one.model.named_parameters()), dict(other.model.named_parameters())
    assert mine.keys() == its.keys()
    assert all(mine[name] is its[name] for name in mine)
    assert one.model.generation_config is not other.model.generation_config


def test_one_prompt_needs_one_desk(model: Any, draft: Draft, two_threads: None) -> None:
    assert len(open_desks(model, draft, Guess, 1)) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_one_prompt_ends_all_of_them(
    model: Any, draft: Draft, error: type[BaseException], two_threads: None
) -> None:
    class Slow(Guess):
        def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
            if threading.current_thread() is not threading.main_thread():  # not the warm-up
                assert broken.wait(60)
                time.sleep(0.2)
                rounds.append(last_token)
            return super().propose(last_token, max_tokens, sampling)

    class Broken(Guess):
        def propose(self, last_token: int, max_tokens: int, sampling: Sampling) -> Proposal:
            if threading.current_thread() is not threading.main_thread():
                broken.set()
                raise error("no more")
            return super().propose(last_token, max_tokens, sampling)

    made: list[Proposer] = []
    rounds: list[int] = []
    broken = threading.Event()

    def make(draft: Draft) -> Proposer:
        made.append(Slow(draft) if not made else Broken(draft))
        return made[-1]

    with pytest.raises(error, match="no more"):
        bench(open_desks(model, draft, make, 9)).run_sets({"a": prompts(40, 90)})
    assert len(rounds) < 16  # not one answer was finished, of 40
    assert not model._forward_pre_hooks
