"""Conversations answered turn by turn, by an engine that is written here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import (
    DataConfig,
    RegenerateConfig,
    RunConfig,
    StrategyConfig,
    TargetConfig,
)
from specforge_core.data.respond import BATCHES, Answerer, Chat, Task
from specforge_core.errors import CaptureError, DataError
from specforge_core.target.info import load_target_info
from specforge_core.testing.toy import toy_tokenizer
from specforge_core.types import Generated, GenerateOptions, Prompt

TOKENIZER = toy_tokenizer()
EOS = TOKENIZER.eos_token_id


class Engine:
    """Answers each prompt with the length of what it read, or as `replies` says, last one first."""

    def __init__(self, target: Path, **replies: Generated) -> None:
        self.info = load_target_info(TargetConfig(path=str(target)))
        self.calls: list[tuple[list[Prompt], GenerateOptions]] = []
        self.replies = {int(index[1:]): reply for index, reply in replies.items()}

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        self.calls.append((list(prompts), options))
        for prompt in reversed(prompts):
            yield self.replies.get(prompt.index) or say(
                prompt.index, f"{len(prompt.input_ids)} tokens"
            )


def say(index: int, text: str, *, finished: bool = True) -> Generated:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Generated(index=index, tokens=(*ids, *([EOS] if finished else [])), finished=finished)


def make_run(target: Path, *, data: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    return RunConfig(
        target=TargetConfig(path=str(target)),
        strategy=StrategyConfig(name="none"),
        data=DataConfig(**(data or {})),
        regenerate=RegenerateConfig(**{"max_new_tokens": 24, **options}),
    )


def tasks(*chats: tuple[str, ...]) -> list[Task]:
    return [
        Task(
            id=str(place),
            where=f"p.jsonl:{place}",
            place=place,
            turns=tuple(({"role": "user", "content": q},) for q in chat),
            metadata={},
            length=len(chat[0]),
        )
        for place, chat in enumerate(chats)
    ]


def ask(
    run: RunConfig, engine: Any, found: Sequence[Task], tokenizer: Any = TOKENIZER
) -> list[Chat]:
    chats = list(Answerer(run, tokenizer, engine).answer(found))
    return sorted(chats, key=lambda chat: chat.task.place)


def answers(chat: Chat) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "assistant"]


def test_turns_are_answered_one_by_one(toy_target: Path) -> None:
    engine = Engine(toy_target)
    both, one = ask(make_run(toy_target), engine, tasks(("Hi", "And now?"), ("else",)))
    assert [m["role"] for m in both.messages] == ["user", "assistant"] * 2
    (first, _), (second, _) = engine.calls
    assert TOKENIZER.decode(first[-1].input_ids.tolist()) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [p.index for p in second] == [0]
    assert f"{answers(both)[0]}<|im_end|>" in TOKENIZER.decode(second[0].input_ids.tolist())
    assert len(answers(one)) == 1


def test_settings_and_seeds_of_turns(toy_target: Path) -> None:
    def seeds(seed: int) -> list[int]:
        engine = Engine(toy_target)
        run = make_run(toy_target, temperature=0.5, top_p=0.9, seed=seed, batch_size=3)
        ask(run, engine, tasks(("a", "b", "c")))
        for _, options in engine.calls:
            assert (options.temperature, options.top_p, options.max_new_tokens) == (0.5, 0.9, 24)
            assert (options.eos, options.batch_size) == (frozenset({EOS}), 3)
        return [options.seed for _, options in engine.calls]

    found = seeds(7)
    assert found[0] == 7
    assert len(set(found)) == 3
    assert seeds(7) == found
    assert not set(seeds(8)) & set(found)


def test_places_are_kept_whatever_is_done_already(toy_target: Path) -> None:
    engine = Engine(toy_target)
    ask(make_run(toy_target), engine, tasks(("a",), ("bb",), ("ccc",))[1:])
    assert sorted(p.index for p in engine.calls[0][0]) == [1, 2]


def test_prompts_are_asked_for_in_bounded_numbers_long_ones_first(toy_target: Path) -> None:
    engine = Engine(toy_target)
    many = tasks(*(("x" * (1 + i),) for i in range(BATCHES * 2 + 3)))
    assert len(ask(make_run(toy_target, batch_size=2), engine, many)) == len(many)
    assert [len(prompts) for prompts, _ in engine.calls] == [BATCHES * 2, 3]
    assert engine.calls[0][0][0].index == len(many) - 1


@pytest.mark.parametrize(
    ("reply", "unfinished", "dropped"),
    [
        (say(0, "yes"), False, None),
        (say(0, "yes", finished=False), False, "unfinished"),
        (say(0, "yes", finished=False), True, None),
        (say(0, " \n"), False, "empty"),
        (Generated(index=0, tokens=(), finished=True), False, "empty"),
    ],
)
def test_answers_kept_and_dropped(
    toy_target: Path, reply: Generated, unfinished: bool, dropped: str | None
) -> None:
    engine = Engine(toy_target, _0=reply)
    run = make_run(toy_target, keep_unfinished=unfinished)
    (chat,) = ask(run, engine, tasks(("Hi", "And now?")))
    assert chat.dropped == dropped
    assert answers(chat) == ([] if dropped else ["yes", "yes"])
    assert len(engine.calls) == (1 if dropped else 2)


def test_a_prompt_that_the_engine_refuses(toy_target: Path) -> None:
    engine = Engine(
        toy_target, _0=Generated(index=0, tokens=(), finished=False, refused="HTTP 400: too long")
    )
    found = tasks(("bad",), ("good",))
    with pytest.raises(DataError) as error:
        ask(make_run(toy_target), engine, found)
    assert "p.jsonl:0: target.engine=transformers refuses the prompt of" in str(error.value)
    assert "(HTTP 400: too long)" in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    bad, good = ask(make_run(toy_target, data={"on_error": "skip"}), engine, found)
    assert (bad.dropped, len(answers(good))) == ("refused by the engine", 1)


def test_an_engine_that_answers_something_else(toy_target: Path) -> None:
    with pytest.raises(CaptureError, match="answered prompt 9, which it was not asked"):
        ask(make_run(toy_target), Engine(toy_target, _0=say(9, "yes")), tasks(("Hi",)))
    engine = Engine(toy_target)
    engine.generate = lambda prompts, options: iter(())  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=r"did not answer p\.jsonl:0 and 1 more"):
        ask(make_run(toy_target), engine, tasks(("Hi",), ("Hi",)))


def test_prompt_without_room_for_an_answer(toy_target: Path) -> None:
    chats = tasks(("x" * 100,), ("Hi",))
    long, short = ask(make_run(toy_target, data={"max_length": 90}), Engine(toy_target), chats)
    assert (long.messages, long.dropped) == ([], "too long")
    assert answers(short)
    run = make_run(toy_target, data={"max_length": 90, "too_long": "raise"})
    with pytest.raises(DataError, match=r"p\.jsonl:0: a prompt of \d+ tokens leaves no room for"):
        ask(run, Engine(toy_target), chats)


def test_template_that_refuses_an_answer(toy_target: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}Q:"
    )
    chats = tasks(("Hi", "And now?"))
    with pytest.raises(DataError, match=r"p\.jsonl:0: the chat template refuses .*one turn only"):
        ask(make_run(toy_target), Engine(toy_target), chats, tokenizer)
    run = make_run(toy_target, data={"on_error": "skip"})
    (chat,) = ask(run, Engine(toy_target), chats, tokenizer)
    assert len(answers(chat)) == 1
    assert chat.dropped == "refused by the chat template"


def test_token_ids_beyond_the_vocabulary(toy_target: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="token id 260 is beyond the target's vocabulary of 260"):
        ask(make_run(toy_target), Engine(toy_target), tasks(("<new>",)), tokenizer)


@pytest.mark.parametrize("token", [-1, 260, 10**30])
def test_tokens_that_the_target_does_not_have(toy_target: Path, token: int) -> None:
    engine = Engine(toy_target, _0=Generated(index=0, tokens=(5, token), finished=False))
    with pytest.raises(
        CaptureError, match=r"p\.jsonl:0: target\.engine=transformers answered with"
    ):
        ask(make_run(toy_target), engine, tasks(("Hi",)))
