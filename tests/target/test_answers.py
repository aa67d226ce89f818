"""Answers of the target in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.toy import toy_tokenizer
from specforge_core.types import Generated, GenerateOptions, Prompt

EOS = toy_tokenizer().eos_token_id
ENDS = frozenset({EOS, *range(0, 256, 16)})
PROMPTS = ([72, 105], list(range(60, 100)), [119, 104, 121], [1])


@pytest.fixture(scope="module")
def engine(toy_target: Path, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """Return a target with an author's sampling advice."""
    path = tmp_path_factory.mktemp("talker") / "target"
    shutil.copytree(toy_target, path)
    advice = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 0.6, "top_k": 20}
    (path / "generation_config.json").write_text(json.dumps(advice))
    target = TargetConfig(path=str(path), dtype="float32", device="cpu")
    return TransformersEngine.load(target, torch.device("cpu"))


def ask(
    engine: TransformersEngine, *rows: Sequence[int], places: Sequence[int] = (), **options: Any
) -> list[Generated]:
    prompts = []
    for place, row in zip(places or range(len(rows)), rows, strict=True):
        ids = torch.tensor(row)
        prompts.append(Prompt(index=place, input_ids=ids, loss_mask=torch.zeros_like(ids)))
    settings = GenerateOptions(**{"max_new_tokens": 24, "eos": ENDS, **options})
    found = list(engine.generate(prompts, settings))
    assert sorted(answer.index for answer in found) == sorted(p.index for p in prompts)
    return sorted(found, key=lambda answer: answer.index)


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int) -> tuple[int, ...]:
    """Continue one prompt token by token, without cache, padding or generate()."""
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in ENDS):
        new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return tuple(new)


@pytest.mark.slow
def test_greedy_answers_are_the_targets_own_argmax(engine: TransformersEngine) -> None:
    """Whatever else is in the batch, and whatever generation_config.json recommends."""
    lengths = set()
    for row, answer in zip(PROMPTS, ask(engine, *PROMPTS), strict=True):
        assert answer.tokens == greedy(engine.model, row, 24)
        assert answer.finished == (answer.tokens[-1] in ENDS)
        lengths.add(len(answer.tokens))
    assert len(lengths) > 1


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_the_index_alone(engine: TransformersEngine) -> None:
    hot: dict[str, Any] = {"temperature": 1.5}
    alone = [ask(engine, row, places=[i], **hot)[0] for i, row in enumerate(PROMPTS)]
    assert ask(engine, *PROMPTS, **hot) == alone
    assert ask(engine, *PROMPTS, batch_size=3, **hot) == alone
    assert ask(engine, *PROMPTS, seed=1, **hot) != alone
    (other,) = ask(engine, PROMPTS[0], places=[5], **hot)
    assert other.tokens != alone[0].tokens


def test_top_p_leaves_out_what_is_unlikely(engine: TransformersEngine) -> None:
    (found,) = ask(engine, PROMPTS[0], temperature=1.5, top_p=1e-6)
    assert found.tokens == greedy(engine.model, PROMPTS[0], 24)


def test_answers_end_where_the_targets_positions_end(engine: TransformersEngine) -> None:
    """The toy target has 512 positions; a short prompt beside a long one keeps its room."""
    long, short = ask(engine, [66] * 505, [66] * 3, max_new_tokens=30, eos=frozenset())
    assert (len(long.tokens), len(short.tokens)) == (7, 30)
    assert not long.finished
    with pytest.raises(CaptureError, match="a prompt of 512 tokens leaves no room"):
        ask(engine, [66] * 512)
