"""The proof that a target computes packed sequences as it computes each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..text import cut
from ..types import CaptureSpec, TargetInfo
from .asked import max_positions
from .proof import LEAK, rounding_limit
from .skeleton import find_parts
from .taps import tap_states
from .varlen import PackedRuns

PROVED = "specforge_packed_proof"
LENGTHS = (9, 40, 150, 20)  # less than a block of the kernel's 64 or 128 tokens, and more than one
MOST = 1 << 15  # tokens of the longest row that is proved: target.batch_tokens may be any number
FAR = 100_003  # a position behind all windows, and no multiple of a chunk's length
# of what an attention may be asked for, what changes nothing here; else None, False or 0
HARMLESS = {"position_ids", "position_embeddings", "cache_position", "layer_idx", "return_dict"}


class _Unlike(Exception):
    """Says why a target is not run packed."""


@torch.no_grad()
def why_padded(model: Any, info: TargetInfo, batch_tokens: int) -> str:
    """Return why this target's sequences are to be padded; nothing where packing is proved right.

    `batch_tokens` are those of the longest row that is to be run.

    Every layer must ask for an attention that `packed_attention` gives: its mask, as the model's
    own function of places says, is the window that the layer names, and it wants nothing more.
    Then states of packed sequences must be those of each alone, and must not change with another,
    nor with the tokens that stand before them in a row as long as any.
    """
    try:
        _prove(model, info, min(batch_tokens, MOST))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except _Unlike as exc:
        return str(exc)
    except Exception as exc:  # the code of any model, which may take no positions, and any kernel
        said = cut(" ".join(f"{type(exc).__name__}: {exc}".split()), 300)
        return f"it cannot be run packed ({said})"
    return ""


def _prove(model: Any, info: TargetInfo, most: int) -> None:
    parts = find_parts(model)
    room = max_positions(info) or max(LENGTHS)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(info.vocab_size, (min(n, room),), generator=draw) for n in LENGTHS]
    asked: set[int] = set()  # by id: what is registered would keep the modules' memory
    AttentionInterface.register(PROVED, _proved(asked))
    AttentionMaskInterface.register(PROVED, _window_as_mask)
    run = PackedRuns(model)
    run(rows[:1], PROVED)
    run([torch.randint(info.vocab_size, (min(most, room),), generator=draw)], PROVED)
    for index, layer in enumerate(parts.layers):
        if not any(id(module) in asked for module in layer.modules()):
            raise _Unlike(f"layer {index} has no attention that transformers looks up")
    alone = [_states(model, partial(_alone, model, row)) for row in rows]
    packed = _packed(model, run, rows)
    for index, (found, given) in enumerate(zip(packed, alone, strict=True)):
        error = _apart(found, given)
        if not error <= max(rounding_limit(given), LEAK):  # of other products than for one alone
            raise _Unlike(f"sequence {index} of a row differs by {error:.2%} from itself alone")
    changed = 1  # into other tokens at the last positions there are: some ropes change with those
    rows[changed] = (rows[changed] + 1) % info.vocab_size
    starts = [0] * len(rows)
    starts[changed] = room - len(rows[changed])
    beside = _packed(model, partial(run, starts=starts), rows)
    _alone(model, rows[0])  # those ropes remember the last position seen, unless all is short again
    for index, (found, given) in enumerate(zip(beside, packed, strict=True)):
        error = _apart(found, given)
        if index != changed and not error <= LEAK:
            raise _Unlike(f"sequence {index} of a row changes by {error:.2%} with another one")
    longest = max(rows, key=len)
    again = _packed(model, run, [longest] * max(2, most // len(longest)), every=False)
    error = _apart(again[-1], again[0])  # some models count a token's place in the row themselves
    if not error <= LEAK:
        raise _Unlike(f"a sequence at the end of a long row differs by {error:.2%} from the first")


def _alone(model: Any, row: Tensor) -> None:
    find_parts(model).decoder(input_ids=row[None].to(model.device), use_cache=False)


def _packed(
    model: Any,
    run: Callable[[Sequence[Tensor]], None],
    rows: Sequence[Tensor],
    *,
    every: bool = True,
) -> Sequence[Tensor]:
    states = _states(model, partial(run, rows), every=every)
    return torch.split(states, [len(row) for row in rows], dim=1)


def _states(model: Any, run: Callable[[], None], *, every: bool = True) -> Tensor:
    """Return every layer's states and the final one, [layers + 2, T, H]; or the final one alone."""
    layers = tuple(range(-1, len(find_parts(model).layers))) if every else ()
    spec = CaptureSpec(layers=layers, final="post_norm", fields={})
    with tap_states(model, spec, stop=False) as taps:
        run()
    assert taps.normed is not None
    return torch.stack([*(taps.hidden_states[layer][0] for layer in layers), taps.normed[0]])


def _apart(found: Tensor, given: Tensor) -> float:
    """Return the relative error of the layer that is furthest off; every token counts alike.

    A first token's norm is often a hundred times that of the others, and would hide them.
    """
    errors = []
    for one, other in zip(found, given, strict=True):  # each layer's [T, H]
        wide = other.double()
        size = wide.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((one.double() - wide).norm(dim=-1) / size).square().mean().sqrt())
    return float(torch.stack(errors).max())


def _window_as_mask(*, mask_function: Callable[..., Tensor], **asked: Any) -> Tensor:
    """Return a mask that is a note: float64, and full of the window that a mask function means."""
    size = (asked["batch_size"], 1, asked["q_length"], asked["kv_length"])
    note = torch.tensor(window_of(mask_function), dtype=torch.float64, device=asked["device"])
    return note.expand(size)  # of one number's memory, however long the row is


def window_of(mask_function: Callable[..., Tensor]) -> int:
    """Return how many tokens a token sees at most, itself among them; 0 where it sees all before.

    `mask_function` takes indices of batch, head, query and key, as transformers has it.  Raises
    where it is neither: of chunks, of images, of what depends on the batch.
    """
    keys, none = torch.arange(FAR + 2), torch.tensor(0)
    count = int(mask_function(none, none, torch.tensor(FAR), keys).sum())
    for place in {0, 1, 2, count - 1, count, count + 1, FAR // 3, FAR // 2, FAR - 1, FAR}:
        seen = mask_function(none, none, torch.tensor(min(place, FAR)), keys)
        apart = min(place, FAR) - keys
        if not torch.equal(seen.expand(keys.shape), (apart >= 0) & (apart < count)):
            raise _Unlike("its masks are neither causal nor sliding windows")
    return 0 if count == FAR + 1 else count


def _proved(asked: set[int]) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        asked.add(id(module))
        _check_mask(attention_mask, options.get("sliding_window"))
        causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise _Unlike("an attention is not causal")
        known = {*HARMLESS, "scaling", "sliding_window", "s_aux", "is_causal"}
        for name, given in options.items():
            if name not in known and (isinstance(given, Tensor) or given):
                raise _Unlike(f"an attention is given {name}")
        shape = (*query.shape[:-1], value.shape[-1])  # what it gives is not looked at
        return query.new_zeros(shape).transpose(1, 2).contiguous(), None

    return attention


def _check_mask(mask: Tensor | None, window: int | None) -> None:
    """Compare the window that a layer names with the one of its mask."""
    if mask is None or mask.dtype != torch.float64:
        raise _Unlike("its layers make masks of their own")
    note = mask if any(mask.stride()) else mask[:1, :1, :1, :1]
    meant = int(note.flatten()[0])
    if not bool((note == meant).all()) or meant != (window or 0):
        raise _Unlike(f"a layer names a window of {window} where its mask has {meant} (0: all)")
