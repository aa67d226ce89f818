"""The draft vocabulary: which of the target's tokens a draft can draft.

d2t [Vd] holds offsets: draft token i is target token i + d2t[i], ascending.  t2d [V] says
which target tokens are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specforge_core.documents import check_regular
from specforge_core.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """Return the `size` most frequent tokens, ascending; ties and unused ones by low id.

    The same on every rank, and whatever the device the counts [V] are on.
    """
    order = torch.sort(counts.cpu(), descending=True, stable=True).indices
    return order[:size].sort().values


def offsets(tokens: Tensor) -> Tensor:
    """Return d2t of ascending target tokens [Vd]."""
    return tokens - torch.arange(len(tokens), device=tokens.device)


def members(d2t: Tensor, vocab_size: int) -> Tensor:
    """Return t2d [V] bool."""
    out = torch.zeros(vocab_size, dtype=torch.bool, device=d2t.device)
    out[target_tokens(d2t)] = True
    return out


def target_tokens(d2t: Tensor) -> Tensor:
    """Return the target token [Vd] of each draft token."""
    return d2t + torch.arange(len(d2t), device=d2t.device)


def check_map(tensors: Mapping[str, Tensor], size: int, vocab_size: int, origin: str) -> Tensor:
    """Return the d2t [size] of a map given as `d2t`, `t2d` or both.

    Raises CheckpointError when the two disagree or are no map into the target's vocabulary.
    """
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if t2d is not None and tuple(t2d.shape) != (vocab_size,):
        raise CheckpointError(
            f"{origin}: t2d has shape {list(t2d.shape)}, and the target has {vocab_size} tokens. "
            "Use a map made for this target"
        )
    if d2t is None:
        if t2d is None:
            raise CheckpointError(f"{origin} has neither d2t nor t2d. Try: another vocab_map")
        d2t = offsets(t2d.bool().nonzero().squeeze(1))
    d2t = d2t.long()
    tokens = target_tokens(d2t)
    if len(tokens) != size:
        raise CheckpointError(
            f"{origin} maps {len(tokens)} draft tokens, and strategy.draft_vocab_size is {size}. "
            f"Try: strategy.draft_vocab_size={len(tokens)}"
        )
    increasing = bool((tokens[1:] > tokens[:-1]).all())
    if not increasing or int(tokens[0]) < 0 or int(tokens[-1]) >= vocab_size:
        raise CheckpointError(
            f"{origin}: d2t must hold offsets, so that i + d2t[i] increases within 0.."
            f"{vocab_size - 1}, but it gives {int(tokens.min())} to {int(tokens.max())}"
            f"{'' if increasing else ', not increasing'}. Were absolute ids stored?"
        )
    if t2d is not None and not torch.equal(members(d2t, vocab_size), t2d.bool()):
        places = int((members(d2t, vocab_size) != t2d.bool()).sum())
        raise CheckpointError(
            f"{origin}: d2t and t2d disagree on {places} tokens. Use a map whose two parts are "
            "of one draft"
        )
    return d2t


def read_map(path: Path, size: int, vocab_size: int) -> Tensor:
    """Return the d2t of a user's own map: a safetensors file, or an exported draft's directory."""
    file = path / WEIGHTS if path.is_dir() else path
    try:
        check_regular(file)
        tensors = load_file(file)
    except (OSError, SafetensorError) as exc:
        raise ConfigError(
            f"strategy.vocab_map {str(path)!r} cannot be read: {exc}. Give a safetensors file with "
            "d2t, t2d or both"
        ) from exc
    return check_map(tensors, size, vocab_size, f"strategy.vocab_map {str(path)!r}")
