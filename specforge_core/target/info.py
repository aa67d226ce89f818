"""What a strategy may know of the target without its weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..config import TargetConfig
from ..documents import read_document
from ..errors import ConfigError
from ..text import cut
from ..types import TargetInfo
from .place import misread, runs_code, wrong_with
from .skeleton import build, count_layers

# what readers of a config ask for, whatever a family calls it
USUAL = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# what every language model has, and more than any does: building so many layers would not end
LARGEST = {"hidden_size": 10**6, "num_hidden_layers": 10**4, "vocab_size": 10**8}


def load_target_info(target: TargetConfig) -> TargetInfo:
    """Read the target's config; no weights.

    Raises ConfigError when there is no such target, or it is no decoder-only model.
    """
    try:
        text = read_document(Path(target.path) / "config.json")  # waits for no pipe
    except OSError:
        return _read(target)  # of a hub, or an error
    if target.trust_remote_code:
        return _read(target)  # its code may be another the next time
    found = _read_text(target.path, target.revision, text)
    return replace(found, config=copy.deepcopy(dict(found.config)))  # each caller's own


@functools.lru_cache(maxsize=16)
def _read_text(path: str, revision: str | None, _text: bytes) -> TargetInfo:
    """Read a directory's config once for as long as its text stays: a run asks four times."""
    return _read(TargetConfig(path=path, revision=revision))


def _read(target: TargetConfig) -> TargetInfo:
    config = load_pretrained(AutoConfig, target)
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(
        text, "use_bidirectional_attention", None
    ) in (
        True,
        "all",
    ):
        raise ConfigError(
            f"target {target.path!r} ({config.model_type}) is not a causal decoder-only model: "
            "its states depend on later tokens. Choose another target.path"
        )
    as_dict = text.to_dict()
    # a multimodal config says outside of its text section whether the head is tied
    as_dict["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    as_dict |= {name: getattr(text, name) for name in USUAL if hasattr(text, name)}
    for name in SPECIAL:  # nor need that section name them
        if as_dict.get(name) is None:
            as_dict[name] = getattr(config, name, None)
    hidden_size, said, vocab_size = (
        _size(text, name, most, target.path) for name, most in LARGEST.items()
    )
    revision = getattr(config, "_commit_hash", None) or target.revision
    num_layers = count_layers(build(config, target.trust_remote_code), said)
    return TargetInfo(
        name_or_path=target.path,
        revision=revision,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        config=as_dict,
        trust_remote_code=target.trust_remote_code,
    )


def _size(config: Any, name: str, most: int, path: str) -> int:
    """Return one of the sizes that every language model has; ConfigError where it cannot be."""
    size = getattr(config, name, None)
    if size is None:
        raise ConfigError(
            f"target {path!r} ({config.model_type}) is no language model: its config has no "
            f"{name}. Choose another target.path"
        )
    if type(size) is not int or not 0 < size <= most:
        raise ConfigError(
            f"target {path!r} has {name} {size!r:.40} in its config.json: a number from 1 to "
            f"{most} is needed. Download it again, or choose another target.path"
        )
    return size


def load_pretrained(auto: Any, target: TargetConfig, **kwargs: Any) -> Any:
    """Call `from_pretrained`, turning what users get wrong into a ConfigError."""
    # transformers takes a config.json itself for a target, and may add an adapter beside it
    if said := misread(target.path):
        raise ConfigError(said)
    try:
        return auto.from_pretrained(
            target.path,
            revision=target.revision,
            trust_remote_code=target.trust_remote_code,
            **kwargs,
        )
    except MemoryError:
        raise
    except Exception as exc:  # whatever a damaged file or a wrong option makes its libraries raise
        if said := wrong_with(target.path) or runs_code(target, exc):
            raise ConfigError(said) from exc
        if auto is not AutoConfig and (said := _unknown_rope(target)):
            raise ConfigError(said) from exc
        lines = str(exc).strip().splitlines()
        known = isinstance(exc, OSError | ValueError | ImportError)
        reason = cut(" ".join(lines[:1] if known else [f"{type(exc).__name__}:", *lines[:2]]), 300)
        revision = f" at revision {target.revision!r}" if target.revision else ""
        advice = (
            "Try: target.path=DIRECTORY or a Hugging Face id, and `hf auth login` if it is gated"
        )
        if Path(target.path).is_dir():
            advice = "Correct its config.json, download it again, or choose another target.path"
        raise ConfigError(
            f"target.path {target.path!r}{revision} cannot be loaded: {reason.rstrip('.')}. "
            f"{advice}"
        ) from exc


def _unknown_rope(target: TargetConfig) -> str | None:
    """Return what to say of a kind of rotary embedding that transformers does not have."""
    with suppress(Exception):  # the config may be what could not be loaded
        text = load_pretrained(AutoConfig, target).get_text_config(decoder=True)
        given = text.rope_parameters
        layered = [value for value in given.values() if isinstance(value, Mapping)]
        kinds = [
            value.get("rope_type", value.get("type", "default")) for value in (given, *layered)
        ]
        known = {"default", *ROPE_INIT_FUNCTIONS}
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            return (
                f"target.path {target.path!r} has rope_type {unknown[0]!r:.40} in its config.json, "
                f"which transformers {transformers.__version__} does not have (it has "
                f"{', '.join(sorted(known))}). Try: pip install -U transformers, or "
                "target.engine=sglang"
            )
    return None
