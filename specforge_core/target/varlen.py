"""Sequences one behind the other in one row, with an attention that keeps them apart: no padding.

transformers looks its attention up by the name in a model's config; for the length of a pass that
name is one of this module.  Shapes: T tokens of all sequences, Hq heads of queries, Hk of keys and
values, D and Dv wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from ..compiled import opaque
from .skeleton import find_parts

PACKED = "specforge_packed"  # of no mask: transformers makes none for names that it has none of
NAMED = "_attn_implementation_internal"  # the public property's setter writes to inner configs, too


@dataclass(frozen=True, slots=True)
class _Row:
    """Where the sequences of the row that is being run end."""

    ends: Tensor  # int32 [sequences + 1], on the device: 0 and each sequence's end
    lengths: list[int]
    # by the tokens of a tile, made at the first layer that asks for those
    tables: dict[int, Tensor] = field(default_factory=dict)


_ROW: ContextVar[_Row] = ContextVar("row")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Return [T, Hq, Dv] for [T, Hq, D], [T, Hk, D] and [T, Hk, Dv].

    A token sees itself and those before it of its own sequence, `window` in all where it is not 0.
    `sinks` [Hq] are logits of a token more, whose value is zero.
    """
    row = _ROW.get()
    longest, narrower = max(row.lengths), query.shape[-1] - value.shape[-1]
    if len(set(row.lengths)) == 1 and sinks is None and not (narrower or 0 < window < longest):
        return _alike(query, key, value, longest, scale)
    if query.device.type != "cuda":
        queries, keys, values = (torch.split(x, row.lengths) for x in (query, key, value))
        each = zip(queries, keys, values, strict=True)
        return torch.cat([_one(q, k, v, sinks, scale, window) for q, k, v in each])
    from . import triton_varlen

    tuning = triton_varlen.tuning_for(query, value)
    if tuning is not None and scale > 0:
        tokens = triton_varlen.tokens_of_a_tile(tuning, query, key)
        if tokens not in row.tables:
            table = tiles(row.lengths, tokens)
            # the device is not waited for: so small a tensor is taken before the call returns
            row.tables[tokens] = table.to(query.device, non_blocking=True)
        table = row.tables[tokens]
        return triton_varlen.attend(query, key, value, sinks, scale, window, table, tuning)
    # torch's own kernel beneath torch.nn.attention.varlen, which takes scale and window only later
    out: Tensor
    logsumexp: Tensor
    out, logsumexp = torch.ops.aten._flash_attention_forward(
        query,
        key,
        F.pad(value, (0, narrower)) if narrower else value,
        row.ends,
        row.ends,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[:2]
    if sinks is not None:  # of all weights the tokens have their share alone
        out = (out * (logsumexp.T - sinks.float()).sigmoid()[..., None]).to(query.dtype)
    return out[..., : value.shape[-1]].contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[-1]))


# to torch.compile neither the longest length nor the number of sequences is a size
_attention = opaque(
    "specforge::packed_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, "
    "float scale, int window) -> Tensor",
    _attend,
    _fake,
)


def tiles(lengths: Sequence[int], tokens: int) -> Tensor:
    """Return [tiles, 3] int32: where a sequence begins, a tile in it, and the sequence's length.

    Those that see most come first, so that the last to run are short.
    """
    size = torch.tensor(lengths)
    counts = (size + tokens - 1) // tokens
    sequence = torch.repeat_interleave(counts)
    nth = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    begins = size.cumsum(0) - size
    table = torch.stack([begins[sequence], nth * tokens, size[sequence]], dim=1)
    return table[nth.argsort(descending=True, stable=True)].to(torch.int32)


def _alike(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float) -> Tensor:
    """Attend within sequences of one length, for which torch has quicker kernels."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).contiguous()


def _one(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int
) -> Tensor:
    """Attend within one sequence: what the kernel is measured by, where there is none."""
    places = torch.arange(len(query), device=query.device)
    apart = places[:, None] - places
    seen = (apart >= 0) & (apart < (window or len(query)))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key).mul(scale).masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], -1)
    weights = scores.float().softmax(-1).to(query.dtype)[..., : len(query)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: [1, Hq, T, D] and keys and values alike give [1, T, Hq, Dv].

    What else it is asked for, `varlen_proof` has looked at once.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    return _attention(*rows, s_aux, scale, sliding_window or 0)[None], None


AttentionInterface.register(PACKED, packed_attention)


class PackedRuns:
    """Runs a model's decoder on sequences that stand one behind the other in one row."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = find_parts(model).decoder
        found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [config for config in found.values() if hasattr(config, NAMED)]

    def __call__(
        self, sequences: Sequence[Tensor], name: str = PACKED, starts: Sequence[int] = ()
    ) -> None:
        """Run sequences [T_i] as one row [1, T], with the attention of that name.

        `starts` are the positions of their first tokens, where not all are 0.
        """
        lengths = [len(sequence) for sequence in sequences]
        ranges = zip(starts or [0] * len(lengths), lengths, strict=True)
        places = torch.cat([torch.arange(start, start + length) for start, length in ranges])
        inputs = torch.stack([torch.cat(list(sequences)), places]).to(self._model.device)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(inputs.device, torch.int32)
        token = _ROW.set(_Row(ends=ends, lengths=lengths))
        try:
            with self._attending(name):
                self._decoder(input_ids=inputs[:1], position_ids=inputs[1:], use_cache=False)
        finally:
            _ROW.reset(token)

    @contextmanager
    def _attending(self, name: str) -> Iterator[None]:
        """Have all modules look another attention up; each config gets back what it said."""
        before = [getattr(config, NAMED) for config in self._configs]
        for config in self._configs:
            setattr(config, NAMED, name)
        try:
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                setattr(config, NAMED, own)
