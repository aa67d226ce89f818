"""The token that stands for unknown tokens must never be one that occurs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from specforge_dflash.mask_token import choose, mask_token, mask_token_occurs
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from specforge_core.errors import ConfigError
from specforge_core.types import TargetInfo


def tokenizer(words: int, *special: str, **roles: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    raw.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **roles)


def make_target(path: str, vocab_size: int, config: dict[str, Any]) -> TargetInfo:
    return TargetInfo(
        name_or_path=path,
        revision=None,
        hidden_size=8,
        num_layers=8,
        vocab_size=vocab_size,
        config=config,
    )


def test_first_row_above_the_tokenizer() -> None:
    assert choose(tokenizer(10, "<s>"), 16, frozenset()) == 11


def test_highest_row_in_a_gap() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 7}, unk_token="a"))
    assert choose(PreTrainedTokenizerFast(tokenizer_object=raw), 8, frozenset()) == 6


def test_the_mask_token_of_the_tokenizer() -> None:
    tok = tokenizer(4, "<reserved_0>", "<mask>", "<x>", mask_token="<mask>")
    assert choose(tok, 7, frozenset()) == 5


def test_lowest_reserved_token_when_every_row_is_used() -> None:
    tok = tokenizer(4, "<s>", "<reserved_0>", "<reserved_1>", "<x>", bos_token="<s>")
    assert choose(tok, 8, frozenset()) == 5


def test_highest_special_token_without_a_role() -> None:
    tok = tokenizer(4, "<s>", "<repo>", "<out>", "<user>", "<end>", "<pad>", pad_token="<pad>")
    tok.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    # <pad> has a role, <end> is the config's end of text, <user> is in the template
    assert choose(tok, 10, frozenset({8})) == 6


def test_no_safe_token_is_an_error() -> None:
    tok = tokenizer(4, "<s>", bos_token="<s>")
    with pytest.raises(ConfigError, match=r"every one of the 5 .* Try: strategy.mask_token_id=ID"):
        choose(tok, 5, frozenset())


def test_the_choice_reads_the_tokenizer_beside_the_target(kit: Any, tmp_path: Path) -> None:
    tokenizer(10, "<s>").save_pretrained(tmp_path)
    target = TargetInfo(
        name_or_path=str(tmp_path),
        revision=None,
        hidden_size=8,
        num_layers=8,
        vocab_size=11 + 3,
        config={"eos_token_id": [3, 4]},
    )
    assert mask_token(None, target) == 11
    assert mask_token(2, target) == 2


def test_a_row_that_does_not_exist_is_refused(kit: Any) -> None:
    with pytest.raises(ConfigError, match=r"mask_token_id 41 is no row of the target's 41"):
        mask_token(41, kit.target())


def test_a_target_without_tokenizer_needs_the_option(kit: Any, tmp_path: Path) -> None:
    target = TargetInfo(
        name_or_path=str(tmp_path),
        revision=None,
        hidden_size=8,
        num_layers=8,
        vocab_size=16,
        config={},
    )
    with pytest.raises(
        ConfigError, match=r"no mask token can be chosen: .* strategy.mask_token_id="
    ):
        mask_token(None, target)


SMOLLM = Path("~/.cache/specforge/smollm2-135m-instruct").expanduser()


@pytest.mark.skipif(not SMOLLM.exists(), reason="needs the cached SmolLM2 target")
def test_a_real_vocabulary_without_free_rows(kit: Any) -> None:
    from transformers import AutoTokenizer

    target = TargetInfo(
        name_or_path=str(SMOLLM),
        revision=None,
        hidden_size=576,
        num_layers=30,
        vocab_size=49152,
        config={"eos_token_id": 2, "pad_token_id": 2},
    )
    found = mask_token(None, target)
    tok = AutoTokenizer.from_pretrained(SMOLLM)
    assert tok.convert_ids_to_tokens(found) == "<empty_output>"


def test_what_to_type_where_it_occurs_depends_on_who_chose_it() -> None:
    assert ". Try: strategy.mask_token_id=null" in mask_token_occurs(7, 7, "it")
    assert ". Try: strategy.mask_token_id=ID" in mask_token_occurs(7, None, "it")
