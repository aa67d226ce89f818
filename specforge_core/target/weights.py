"""Read single tensors of the target from its safetensors files, without loading the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..documents import check_regular, read_object
from ..errors import CaptureError
from ..types import TargetInfo
from .place import pointer
from .skeleton import best_match, is_tied, parameter_names, stored_as

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED = {"lm_head": "embed_tokens", "embed_tokens": "lm_head"}


class NoSafetensors(CaptureError):
    """A target's weights are of another format, or not here."""


def load_target_tensors(target: TargetInfo, names: Iterable[str]) -> dict[str, Tensor]:
    """Return `embed_tokens` [V, H], `lm_head` [V, H] and `final_norm` [H], as asked, on the CPU.

    They are as stored (of 64 bits in 32): V may be padded beyond the vocabulary, and some families
    add 1 to the norm's weight or scale the embedding (`embedding_scale`).  Only the
    files that hold them are fetched.  Raises CaptureError when the target has no
    safetensors or no such tensor.
    """
    files = tensor_names(target)
    tensors: dict[str, Tensor] = {}
    for name in names:
        key = _find(target, name, files)
        tensors[name] = _read(target, files[key], key)
        hidden, shape = target.hidden_size, list(tensors[name].shape)
        if shape != ([hidden] if name == "final_norm" else [shape[0], hidden]):
            raise CaptureError(
                f"{key} of {target.name_or_path!r} has shape {shape}, which does not fit hidden "
                f"size {hidden}. Check target.path"
            )
        if tensors[name].dtype == torch.float64:
            tensors[name] = tensors[name].float()
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CaptureError(
                f"{key} of {target.name_or_path!r} is quantised ({tensors[name].dtype}). "
                "Use the target's unquantised checkpoint: target.path=..."
            )
    return tensors


def load_head_bias(target: TargetInfo) -> Tensor | None:
    """Return what the head adds [V] before its scale, on the CPU; None for most targets."""
    name = parameter_names(target).get("lm_head.bias")
    files = tensor_names(target)
    key = next(iter(best_match(name, files)), None) if name else None
    return None if key is None else _read(target, files[key], key)


def embedding_scale(target: TargetInfo) -> float:
    """Return what the target multiplies its embeddings by before the first layer."""
    config = target.config
    by_size = any(config.get(key) for key in ("mup_enabled", "scale_embedding"))  # AFMoE; XGLM
    if by_size or "gemma" in str(config.get("model_type")):
        return math.sqrt(target.hidden_size)
    for key in ("embedding_multiplier", "scale_emb"):  # Granite, Falcon-H1; MiniCPM
        if config.get(key) is not None:
            return float(config[key])
    return 1.0


def tensor_names(target: TargetInfo) -> dict[str, str]:
    """Return the tensors of the target's checkpoint: name -> safetensors file, fetching none.

    Raises CaptureError when there are none, or the list of them is damaged.
    """
    if (single := fetch(target, SINGLE)) is not None:  # the one that transformers loads, too
        with _open(single) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    if (index := fetch(target, INDEX)) is not None:
        return _weight_map(index)
    raise NoSafetensors(
        f"target {target.name_or_path!r} has no {SINGLE} here, and weights of other formats are "
        "not read. Convert it with transformers: model.save_pretrained(DIRECTORY), then "
        "target.path=DIRECTORY"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Return what an index names: files beside it, whatever it says."""
    try:
        files = read_object(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ValueError("it has no weight_map")
        for name in files.values():
            parts = PurePosixPath(name).parts if isinstance(name, str) else ()
            if not parts or parts[0] == "/" or ".." in parts or not name.isprintable():
                raise ValueError(f"{name!r:.80} is no file beside it")
    except (OSError, ValueError) as exc:
        said = pointer(index) if isinstance(exc, ValueError) else None
        raise CaptureError(said or f"{index} is damaged: {exc}. Download it again") from exc
    return files


def tensor_dtypes(target: TargetInfo) -> dict[str, str]:
    """Return safetensors' code of each tensor's dtype in the target's checkpoint, such as "F32".

    Raises CaptureError when there are none, or for the first file that is missing or damaged.
    """
    found: dict[str, str] = {}
    for file in sorted(set(tensor_names(target).values())):
        with _open(_fetched(target, file)) as opened:
            found |= {key: str(opened.get_slice(key).get_dtype()) for key in opened.keys()}  # noqa: SIM118 - safe_open is no dict
    return found


def tensor_files(target: TargetInfo) -> dict[str, Path]:
    """Return where each tensor of the target's checkpoint is: name -> safetensors file.

    Raises CaptureError when there are none, or for the first file that is missing or damaged.
    """
    names = tensor_names(target)
    files = {file: _fetched(target, file) for file in sorted(set(names.values()))}
    for path in files.values():
        with _open(path):
            pass
    return {key: files[file] for key, file in names.items()}


def _fetched(target: TargetInfo, file: str) -> Path:
    if (path := fetch(target, file)) is None:
        raise CaptureError(
            f"target {target.name_or_path!r} lacks {file}, which its {INDEX} names. "
            "Download it again"
        )
    return path


def _read(target: TargetInfo, file: str, key: str) -> Tensor:
    with _open(_fetched(target, file)) as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


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


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a safetensors file; CaptureError naming it where it is damaged, or cannot be read."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as exc:
        raise CaptureError(_damaged(path, exc)) from exc
    except OSError as exc:
        why = exc.strerror or exc
        raise CaptureError(f"{path} cannot be read: {why}. Get the right to, or a copy") from exc


def _damaged(path: Path, exc: Exception) -> str:
    """Say what is wrong with a safetensors file."""
    damaged = f"{path} is damaged, or its download did not end: {exc}. Download it again"
    return pointer(path) or damaged


def _find(target: TargetInfo, name: str, files: Mapping[str, str]) -> str:
    """Return the checkpoint's key of one tensor, following a tied head to the embedding.

    A head that the checkpoint has beside a config that ties it is the target's: transformers
    runs it, and so capture, training and evaluation all do.
    """
    names = parameter_names(target)
    key = _key(names.get(name), files, target)
    if key is None and name in TIED and is_tied(target):
        key = _key(names.get(TIED[name]), files, target)
    if key is None:
        raise CaptureError(
            f"no {name} in the weights of target {target.name_or_path!r} (looked for "
            f"{names.get(name, 'a module of this kind')}). Download it again, or choose another "
            "target.path"
        )
    return key


def _key(name: str | None, files: Mapping[str, str], target: TargetInfo) -> str | None:
    """Return the key that holds a parameter; where several may, one whose rows are states."""
    if name is None:
        return None
    found = best_match(name, files) or stored_as(name, files, target)
    if len(found) > 1 and found[0] != name:
        found = [
            key for key in found if _shape(target, files[key], key)[-1:] == [target.hidden_size]
        ]
    return found[0] if found else None


def _shape(target: TargetInfo, file: str, key: str) -> list[int]:
    with _open(_fetched(target, file)) as opened:
        return list(opened.get_slice(key).get_shape())
