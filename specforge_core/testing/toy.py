"""A target small enough for unit tests, and conversations to go with it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 260 tokens with ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_toy_target(path: Path, *, seed: int = 0, **config: Any) -> None:
    """Save a random Llama of 6 layers and hidden size 32; `config` overrides its fields."""
    tokenizer = toy_tokenizer()
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    """Write the toy target with conversations to train on: the directory toy-target, or argv's."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "toy-target")
    save_toy_target(path)
    write_conversations(path / "train.jsonl", 64)


def write_conversations(path: Path, count: int, *, seed: int = 0, turns: int = 1) -> Path:
    """Write `count` conversations of ragged lengths as OpenAI JSONL; return `path`."""
    draw = random.Random(seed)
    words = ("one", "two", "three", "four", "five", "six", "seven")
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            messages = []
            for _ in range(turns):
                text = " ".join(draw.choices(words, k=draw.randint(2, 12)))
                messages += [
                    {"role": "user", "content": f"say {text}"},
                    {"role": "assistant", "content": text},
                ]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    return path


if __name__ == "__main__":
    main()
