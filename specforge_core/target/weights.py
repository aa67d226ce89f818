"""Read single tensors of the target from its safetensors files, without loading the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from ..errors import CaptureError
from ..types import TargetInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# how models spell their decoder's list of layers, and the norm behind it
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm")
# how checkpoints spell each tensor: the end of its name, of which the shortest match counts
SPELLINGS = {
    "embed_tokens": ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"),
    "lm_head": ("lm_head", "embed_out"),
    "final_norm": FINAL_NORMS,
}
TIED = {"lm_head": "embed_tokens", "embed_tokens": "lm_head"}
# where other modalities and extra prediction heads, like layers, have tensors of such names
BESIDE = ("visual", "vision", "audio", "mtp", "encoder")


def load_target_tensors(target: TargetInfo, names: Iterable[str]) -> dict[str, Tensor]:
    """Return `embed_tokens` [V, H], `lm_head` [V, H] and `final_norm` [H], as asked, on the CPU.

    They are as stored: V may be padded beyond the vocabulary, and some families
    add 1 to the norm's weight or scale the embedding (`embedding_scale`).  Raises
    CaptureError when the target has no safetensors or no such tensor.
    """
    files = tensor_files(target)
    tensors: dict[str, Tensor] = {}
    for name in names:
        key = _find(target, name, files)
        with safe_open(str(files[key]), framework="pt") as file:
            tensors[name] = file.get_tensor(key)
        hidden, shape = target.hidden_size, list(tensors[name].shape)
        if shape != ([hidden] if name == "final_norm" else [shape[0], hidden]):
            raise CaptureError(
                f"{key} of {target.name_or_path!r} has shape {shape}, which does not fit hidden "
                f"size {hidden}. Check target.path"
            )
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CaptureError(
                f"{key} of {target.name_or_path!r} is quantised ({tensors[name].dtype}). "
                "Use the target's unquantised checkpoint: target.path=..."
            )
    return tensors


def load_head_bias(target: TargetInfo) -> Tensor | None:
    """Return what the head adds [V] before its scale, on the CPU; None for most targets."""
    files = tensor_files(target)
    if (key := _spelled("lm_head", files, "bias")) is None:
        return None
    with safe_open(str(files[key]), framework="pt") as file:
        bias: Tensor = file.get_tensor(key)
    return bias


def embedding_scale(target: TargetInfo) -> float:
    """Return what the target multiplies its embeddings by before the first layer."""
    config = target.config
    if "gemma" in str(config.get("model_type")):
        return math.sqrt(target.hidden_size)
    for key in ("embedding_multiplier", "scale_emb"):  # Granite, Falcon-H1; MiniCPM
        if config.get(key) is not None:
            return float(config[key])
    return 1.0


def tensor_files(target: TargetInfo) -> dict[str, Path]:
    """Return where each tensor of the target's checkpoint is: name -> safetensors file.

    Raises CaptureError when there are none.
    """
    if (index := fetch(target, INDEX)) is not None:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        shards = {file: fetch(target, file) for file in sorted(set(weight_map.values()))}
        if missing := [file for file, path in shards.items() if path is None]:
            raise CaptureError(
                f"target {target.name_or_path!r} lacks {missing[0]}, which its {INDEX} names. "
                "Download it again"
            )
        return {key: path for key, file in weight_map.items() if (path := shards[file])}
    if (single := fetch(target, SINGLE)) is not None:
        with safe_open(str(single), framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    raise CaptureError(
        f"target {target.name_or_path!r} has no {SINGLE} here, and weights of other formats are "
        "not read. Convert it with transformers: model.save_pretrained(DIRECTORY), then "
        "target.path=DIRECTORY"
    )


def fetch(target: TargetInfo, file: str) -> Path | None:
    """Return one file of the target, from its directory or the Hugging Face cache, if it has it."""
    local = Path(target.name_or_path)
    if local.is_dir():
        return local / file if (local / file).is_file() else None
    try:
        return Path(hf_hub_download(target.name_or_path, file, revision=target.revision))
    except EntryNotFoundError:  # also when offline and not in the cache
        return None
    except (OSError, ValueError) as exc:
        raise CaptureError(
            f"{file} of target {target.name_or_path!r} cannot be fetched: {exc}. Try: "
            f"hf download {target.name_or_path}"
        ) from exc


def _find(target: TargetInfo, name: str, keys: Iterable[str]) -> str:
    """Return the checkpoint's key of one tensor, following a tied head to the embedding."""
    if (key := _spelled(name, keys)) is not None:
        return key
    twin = TIED.get(name)
    if twin is not None and target.config.get("tie_word_embeddings"):
        key = _spelled(twin, keys)
    if key is None:
        raise CaptureError(
            f"no {name} in the weights of target {target.name_or_path!r} (looked for names ending "
            f"in {', '.join(SPELLINGS[name])}). This target cannot be used with the strategy"
        )
    return key


def _spelled(name: str, keys: Iterable[str], kind: str = "weight") -> str | None:
    found = []
    for key in keys:
        *path, last, end = key.split(".") if key.count(".") else ("", key, "")
        if end == kind and last in SPELLINGS[name] and not _elsewhere(path):
            found.append(key)
    return min(found, key=len, default=None)


def _elsewhere(path: Iterable[str]) -> bool:
    return any(part in LAYER_LISTS or part.startswith(BESIDE) for part in path)
