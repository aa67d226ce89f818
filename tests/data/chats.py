"""A chat, and tokenizers with the templates of published targets (files in trl's wheel)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specforge_core.data.chat import Encoder, Row
from specforge_core.data.sources import Message

from .bpe import trained_bpe

Options = Mapping[str, Any]


def encode(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], options: Options
) -> list[Row]:
    return Encoder(tokenizer, options).rows(chat)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], options: Options
) -> list[int]:
    return Encoder(tokenizer, options).prompt(chat)


def render(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], options: Options, *, prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(chat), tokenize=False, add_generation_prompt=prompt, **options
        )
    )


SMOLLM2 = Path.home() / ".cache/specforge/smollm2-135m-instruct"
ANSWERS = ("Hello there 🙂, 12345!\n\n- one\n- two", "Ünïcödé 漢字:  it ends in spaces  ")
CHAT = [
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
BAR = "\uff5c"  # DeepSeek's full-width bar
# template -> bos, eos, its other special tokens
SPECIAL = {
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "gemma": ("<bos>", "<end_of_turn>", ("<start_of_turn>", "<eos>")),
    "phi3": ("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "qwen3": ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "deepseek_r1_distill": (
        f"<{BAR}begin▁of▁sentence{BAR}>",
        f"<{BAR}end▁of▁sentence{BAR}>",
        (f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
    ),
    "gptoss": (
        "<|startoftext|>",
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    ),
}


def published(name: str) -> PreTrainedTokenizerFast:
    """Return a small trained BPE tokenizer with a published template and its special tokens."""
    trl = importlib.util.find_spec("trl")
    assert trl is not None, "the templates are in trl's wheel: pip install --no-deps trl"
    assert trl.submodule_search_locations is not None
    template = Path(trl.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    bos, eos, others = SPECIAL[name]
    return trained_bpe(
        [Path(__file__).read_text(encoding="utf-8")],
        (bos, eos, *others),
        bos=bos,
        eos=eos,
        template=template.read_text(encoding="utf-8"),
    )


def supervised(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[str]:
    """Return the text of every run of supervised tokens."""
    assert len(row.input_ids) == len(row.loss_mask)
    pairs = zip(row.loss_mask, row.input_ids, strict=True)
    return [
        str(tokenizer.decode([token for _, token in run]))
        for on, run in groupby(pairs, key=lambda pair: pair[0])
        if on
    ]
