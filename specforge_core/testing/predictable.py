"""A toy target that a draft can learn in seconds, and conversations that it answered itself.

Its next token hangs on the last one most of all, a little on what came before, and
is a small letter or a space: answers never end by themselves, and survive being text.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .toy import save_toy_target, write_conversations

EMBEDDING_SCALE = 2.0
LAYER_SCALE = 0.15


def save_predictable_target(path: Path, **config: Any) -> None:
    """Save the target with its tokenizer; `config` overrides its fields."""
    save_toy_target(
        path, **{"tie_word_embeddings": False, "initializer_range": LAYER_SCALE, **config}
    )
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    letters = tokenizer(string.ascii_lowercase + " ", add_special_tokens=False)["input_ids"]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape, generator=draw) * EMBEDDING_SCALE)
        rows = torch.randn(head.shape, generator=draw)[letters]
        head.zero_()
        head[letters] = rows
    model.save_pretrained(path)


def write_own_answers(target: Path, path: Path, count: int, *, length: int, seed: int = 0) -> Path:
    """Write `count` conversations whose answers are the target's own greedy ones."""
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    lines = write_conversations(path, count, seed=seed).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    asked = [row["messages"][:1] for row in rows]
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=length, do_sample=False)
    answers = tokenizer.batch_decode(found[:, ids["input_ids"].shape[1] :])
    with path.open("w", encoding="utf-8") as file:
        for row, prompt, text in zip(rows, asked, answers, strict=True):
            messages = [*prompt, {"role": "assistant", "content": text}]
            file.write(json.dumps({**row, "messages": messages}) + "\n")
    return path
