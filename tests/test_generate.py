from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_core.data.generate import Generator

from specforge_core.config import DataConfig, RegenerateConfig, RunConfig, StrategyConfig
from specforge_core.config import TargetConfig as Target
from specforge_core.data.chat import encode_prompt
from specforge_core.data.respond import Chat, Task
from specforge_core.errors import DataError
from specforge_core.testing.toy import toy_tokenizer

TOKENIZER = toy_tokenizer()
EOS = TOKENIZER.eos_token_id
QUESTIONS = ("Hi", "a much longer question, with more words", "why?", "one two three")


@pytest.fixture(scope="module")
def talker(toy_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a target that stops at any of many tokens, and has an author's sampling advice."""
    path = tmp_path_factory.mktemp("talker") / "target"
    shutil.copytree(toy_target, path)
    advice = {
        "eos_token_id": [EOS, *range(0, 256, 16)],
        "repetition_penalty": 5.0,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
    }
    (path / "generation_config.json").write_text(json.dumps(advice))
    return path


def make_run(path: Path, *, data: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    return RunConfig(
        target=Target(path=str(path), device="cpu", dtype="float32"),
        strategy=StrategyConfig(name="none"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(**{"max_new_tokens": 24, **options}),
    )


def make_task(name: str, *questions: str) -> Task:
    turns = tuple(({"role": "user", "content": q},) for q in questions)
    return Task(name, f"p.jsonl:{name}", turns, {}, 0)


def tasks(*chats: tuple[str, ...]) -> list[Task]:
    return [make_task(str(i), *chat) for i, chat in enumerate(chats)]


def answers(chat: Chat) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "assistant"]


@torch.no_grad()
def greedy(model: Any, ids: list[int], ends: set[int], count: int) -> list[int]:
    """Continue one prompt token by token, without cache, padding or generate()."""
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in ends):
        new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


def test_greedy_answers_are_the_targets_own_argmax(talker: Path) -> None:
    """Whatever else is in the batch, and whatever generation_config.json recommends."""
    generator = Generator(make_run(talker, keep_unfinished=True), TOKENIZER)
    ends = {EOS, *range(0, 256, 16)}
    found = generator.answer_batch(tasks(*((q,) for q in QUESTIONS)))

    lengths = set()
    for question, chat in zip(QUESTIONS, found, strict=True):
        prompt = encode_prompt(TOKENIZER, [{"role": "user", "content": question}], {})
        tokens = greedy(generator.model, prompt, ends, 24)
        lengths.add(len(tokens))
        kept = tokens[:-1] if tokens[-1] in ends else tokens
        assert answers(chat) == [TOKENIZER.decode(kept)]
    assert len(lengths) > 1


def test_turns_are_answered_one_by_one(talker: Path) -> None:
    generator = Generator(make_run(talker, keep_unfinished=True), TOKENIZER)
    both, _ = generator.answer_batch(tasks(("Hi", "And now?"), ("something else",)))

    (first, second) = answers(both)
    assert [m["role"] for m in both.messages] == ["user", "assistant"] * 2
    prompt = encode_prompt(TOKENIZER, both.messages[:3], {})
    tokens = greedy(generator.model, prompt, set(generator.ends), 24)
    assert second == TOKENIZER.decode([t for t in tokens if t not in generator.ends])
    assert first != second


def test_answer_that_is_cut_off_is_dropped_and_ends_its_conversation(toy_target: Path) -> None:
    run = make_run(toy_target, max_new_tokens=3)
    (chat,) = Generator(run, TOKENIZER).answer_batch(tasks(("Hi", "And now?")))
    assert (chat.messages, chat.dropped) == ([], "unfinished")

    run = make_run(toy_target, max_new_tokens=3, keep_unfinished=True)
    generator = Generator(run, TOKENIZER)
    (chat,) = generator.answer_batch(tasks(("Hi", "And now?")))
    assert len(answers(chat)) == 2
    assert (generator.num_tokens, chat.dropped) == (6, None)


def test_draws_depend_on_the_seed_the_prompt_and_the_turn(talker: Path) -> None:
    def draw(name: str, seed: int) -> list[str]:
        run = make_run(talker, temperature=1.5, keep_unfinished=True, seed=seed)
        (chat,) = Generator(run, TOKENIZER).answer_batch([make_task(name, "Hi", "Hi")])
        return answers(chat)

    again = draw("a", 0)
    assert draw("a", 0) == again
    assert draw("a", 1) != again
    assert draw("b", 0) != again
    assert again[0] != again[1]


def test_prompt_without_room_for_an_answer(toy_target: Path) -> None:
    chats = tasks(("x" * 100,), ("Hi",))
    keep: dict[str, Any] = {"keep_unfinished": True}
    generator = Generator(make_run(toy_target, data={"max_length": 90}, **keep), TOKENIZER)
    long, short = generator.answer_batch(chats)
    assert (long.messages, long.dropped) == ([], "too long")
    assert answers(short)

    run = make_run(toy_target, data={"max_length": 90, "too_long": "raise"}, **keep)
    with pytest.raises(DataError, match=r"p\.jsonl:0: a prompt of \d+ tokens leaves no room for"):
        Generator(run, TOKENIZER).answer_batch(chats)


def test_answers_end_where_the_targets_positions_end(toy_target: Path) -> None:
    """The toy target has 512 positions."""
    run = make_run(toy_target, max_new_tokens=100, keep_unfinished=True)
    generator = Generator(run, TOKENIZER)
    question = "x" * 460
    (chat,) = generator.answer_batch(tasks((question,)))
    length = len(encode_prompt(TOKENIZER, [{"role": "user", "content": question}], {}))
    assert generator.num_tokens == 512 - length
    assert answers(chat)


def test_template_that_refuses_an_answer(toy_target: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}Q:"
    )
    chats = tasks(("Hi", "And now?"))
    keep: dict[str, Any] = {"keep_unfinished": True}
    with pytest.raises(DataError, match=r"p\.jsonl:0: the chat template refuses .*one turn only"):
        Generator(make_run(toy_target, **keep), tokenizer).answer_batch(chats)
    run = make_run(toy_target, data={"on_error": "skip"}, **keep)
    (chat,) = Generator(run, tokenizer).answer_batch(chats)
    assert len(answers(chat)) == 1
    assert chat.dropped == "refused by the chat template"


def test_token_ids_beyond_the_vocabulary(toy_target: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="token id 260 is beyond the target's vocabulary of 260"):
        Generator(make_run(toy_target), tokenizer).answer_batch(tasks(("<new>",)))
