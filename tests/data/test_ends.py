"""Which tokens end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from specforge_core.config import TargetConfig
from specforge_core.data.ends import end_tokens
from specforge_core.errors import ConfigError
from specforge_core.target.info import load_target_info
from specforge_core.testing.toy import toy_tokenizer

TOKENIZER = toy_tokenizer()
ENDOFTEXT, IM_END = (TOKENIZER.convert_tokens_to_ids(f"<|{t}|>") for t in ("endoftext", "im_end"))


@pytest.fixture
def path(toy_target: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_target, tmp_path / "target")


def change(path: Path, name: str, **values: Any) -> None:
    file = path / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **values}))


def ends(path: Path, tokenizer: Any = TOKENIZER) -> frozenset[int]:
    target = TargetConfig(path=str(path))
    return end_tokens(load_target_info(target), tokenizer)


def test_all_that_the_targets_files_name_end_an_answer(path: Path) -> None:
    change(path, "config.json", eos_token_id=7)
    change(path, "generation_config.json", eos_token_id=[5, 9])
    assert ends(path) == {5, 7, 9, IM_END}
    (path / "generation_config.json").unlink()
    assert ends(path) == {7, IM_END}


def test_the_template_closes_an_answer_with_one_that_no_file_names(path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        change(path, name, eos_token_id=None)
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert ends(path, tokenizer) == {ENDOFTEXT, IM_END}
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    assert ends(path, tokenizer) == {ENDOFTEXT}


def test_of_several_special_tokens_behind_an_answer_the_first_ends_it(path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        change(path, name, eos_token_id=None)
    tokenizer = toy_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\n", "<|mask|><|endoftext|>"
    )
    mask = tokenizer.convert_tokens_to_ids("<|mask|>")
    assert ends(path, tokenizer) == {mask, IM_END}  # the tokenizer's own is IM_END


def test_tokens_beyond_the_vocabulary_end_nothing(path: Path) -> None:
    change(path, "generation_config.json", eos_token_id=[5, 260])
    assert ends(path) == {5, IM_END}


@pytest.mark.parametrize("named", ["<|im_end|>", [1.5], {"a": 1}, [[1]]])
def test_what_is_no_token_is_named(path: Path, named: Any) -> None:
    change(path, "generation_config.json", eos_token_id=named)
    with pytest.raises(ConfigError, match=r"generation_config\.json of target .*eos_token_id"):
        ends(path)
