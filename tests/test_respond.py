from __future__ import annotations

from specforge_core.config import RegenerateConfig, RunConfig, StrategyConfig, TargetConfig
from specforge_core.data.respond import Chat, Rules, Task, end_tokens
from specforge_core.testing.toy import toy_tokenizer

TOKENIZER = toy_tokenizer()
ASKED = [{"role": "user", "content": "Hi"}]


def rules(positions: int | None = None, *, keep_unfinished: bool = False) -> Rules:
    run = RunConfig(
        target=TargetConfig(path="toy"),
        strategy=StrategyConfig(name="none"),
        regenerate=RegenerateConfig(max_new_tokens=10, keep_unfinished=keep_unfinished),
    )
    return Rules(run, TOKENIZER, len(TOKENIZER), positions)


def test_room_is_what_positions_leave() -> None:
    assert rules().room(1000) == 10
    assert rules(100).room(50) == 10
    assert rules(100).room(93) == 7


def test_answers_kept_and_dropped() -> None:
    def kept(text: str, finished: bool, *, unfinished: bool = False) -> tuple[int, str | None]:
        chat = Chat(Task("a", "p.jsonl:1", (tuple(ASKED),), {}, 3))
        rules(keep_unfinished=unfinished).keep(chat, ASKED, text, finished)
        assert chat.messages in ([], [*ASKED, {"role": "assistant", "content": text}])
        return len(chat.messages), chat.dropped

    assert kept("yes", True) == (2, None)
    assert kept("yes", False) == (0, "unfinished")
    assert kept("yes", False, unfinished=True) == (2, None)
    assert kept(" \n", True) == (0, "empty")


def test_end_tokens_are_the_models_and_the_tokenizers() -> None:
    eos = TOKENIZER.eos_token_id
    assert end_tokens(None, TOKENIZER) == [eos]
    assert end_tokens(7, TOKENIZER) == [7, eos]
    assert end_tokens([eos, 0, 7], TOKENIZER) == [0, 7, eos]
    other = toy_tokenizer()
    other.eos_token = None
    assert end_tokens(None, other) == []
