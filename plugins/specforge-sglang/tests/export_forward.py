"""Runs where SGLang is installed: its own target and draft classes on a CPU, without a server.

python export_forward.py TARGET REQUEST.json PORT OUTPUT EXPORT...

Model classes, KV pool, batches and attention (backend torch_native) are SGLang's.  Its speculative
workers need other backends, so what they do between the models is done here, for one request: the
target reads the prompt and hands out the layers that the export's config names, the draft drafts.
Writes OUTPUT/NAME.safetensors for each export's directory NAME.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from export_keys import build, prepare
from safetensors.torch import load_file, save_file
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from torch import Tensor

LENGTH, ROW = 64, 1  # slots of a pool, and the request's row; the first of each is for padding


def load(path: str) -> Any:
    model = build(path, torch.float32)
    model.load_weights(list(load_file(Path(path) / "model.safetensors").items()))
    return model


class Request:
    """One request's keys and values in the layers of one model, and forward passes over them."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model
        self.slots = torch.arange(1, LENGTH)
        self.pool = MHATokenToKVPool(
            size=LENGTH,
            page_size=1,
            dtype=torch.float32,
            head_num=config.num_key_value_heads,
            head_dim=config.head_dim,
            layer_num=config.num_hidden_layers,
            device="cpu",
            enable_memory_saver=False,
        )
        rows = ReqToTokenPool(ROW, LENGTH, "cpu", enable_memory_saver=False)
        rows.req_to_token[ROW, : LENGTH - 1] = self.slots
        runner = SimpleNamespace(device="cpu", req_to_token_pool=rows, token_to_kv_pool=self.pool)
        self.backend = TorchNativeAttnBackend(runner)

    def forward(
        self,
        mode: ForwardMode,
        ids: Tensor,
        start: int,
        fed: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> Any:
        """Run `ids` [n] at positions `start` and on; `fed` are the states [n, *] of spec_info."""
        count = len(ids)
        positions = torch.arange(start, start + count)
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=1,
            input_ids=ids,
            req_pool_indices=torch.tensor([ROW]),
            seq_lens=torch.tensor([start + count]),
            out_cache_loc=self.slots[start : start + count],
            seq_lens_sum=start + count,
            positions=positions,
            extend_prefix_lens=torch.tensor([start]),
            extend_seq_lens=torch.tensor([count]),
            extend_seq_lens_cpu=[count],
            spec_info=SimpleNamespace(hidden_states=fed, select_index=None),
            capture_hidden_mode=CaptureHiddenMode.FULL,
        )
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.backend)):
            return self.model(ids, positions, batch, input_embeds=embeds)


def eagle3(draft: Any, target: Any, ids: Tensor, last: int, steps: int) -> dict[str, Tensor]:
    """Return every row's logits and fed-back state, and a greedy chain with its logits."""
    target.set_eagle3_layers_to_capture(
        draft.config.eagle_config["eagle_aux_hidden_state_layer_ids"]
    )
    features = Request(target).forward(ForwardMode.EXTEND, ids, 0).hidden_states
    draft.model.embed_tokens.weight = target.get_embed_and_head()[
        0
    ]  # 0.5.14's set_embed needs CUDA
    request = Request(draft)
    following = torch.cat([ids[1:], torch.tensor([last])])
    out = request.forward(ForwardMode.DRAFT_EXTEND_V2, following, 0, features)
    told = {"features": features, "logits": out.next_token_logits, "fed": out.hidden_states}
    tokens, logits = [], []
    for step in range(steps):
        logits.append(out.next_token_logits[-1])
        tokens.append(draft.hot_token_id[logits[-1].argmax()])
        if step + 1 < steps:
            place, fed = len(ids) + step, out.hidden_states[-1:]
            out = request.forward(ForwardMode.DECODE, tokens[-1].view(1), place, fed)
    return told | {"tokens": torch.stack(tokens), "chain": torch.stack(logits)}


def dflash(draft: Any, target: Any, ids: Tensor, last: int) -> dict[str, Tensor]:
    """Return the block's final states, and the logits of the slots that are drafted from."""
    config = parse_dflash_draft_config(draft_hf_config=draft.config)
    layers = config.resolve_target_layer_ids(
        target_num_layers=target.config.num_hidden_layers,
        draft_num_layers=draft.config.num_hidden_layers,
    )
    target.set_dflash_layers_to_capture(layers)
    features = Request(target).forward(ForwardMode.EXTEND, ids, 0).hidden_states
    request = Request(draft)
    with torch.no_grad():  # as the worker does it, from projected features to the cache
        context = draft.project_target_hidden(features)
        for layer in draft.layers:
            attention = layer.self_attn
            k, v = attention.kv_proj_only(context)
            k = attention.apply_k_rope(torch.arange(len(ids)), attention.apply_k_norm(k))
            k, v = (x.view(-1, attention.num_kv_heads, attention.head_dim) for x in (k, v))
            request.pool.set_kv_buffer(attention.attn, request.slots[: len(ids)], k, v)
        block = torch.full((draft.block_size,), config.mask_token_id)
        block[0] = last
        embeds = target.get_input_embeddings()(block)
    mode = ForwardMode.TARGET_VERIFY
    states = request.forward(mode, block, len(ids), embeds=embeds).hidden_states
    head = target.get_embed_and_head()[1][: target.config.vocab_size]  # the rest is padding
    return {"features": features, "states": states, "logits": states[1:] @ head.detach().T}


def main(target_path: str, request: str, port: str, output: str, *exports: str) -> None:
    prepare(target_path, port)
    target = load(target_path)
    asked = json.loads(Path(request).read_text())
    ids, last, steps = torch.tensor(asked["ids"]), asked["last"], asked["steps"]
    for path in exports:
        draft = load(path)
        if type(draft).__name__ == "DFlashDraftModel":
            told = dflash(draft, target, ids, last)
        else:
            told = eagle3(draft, target, ids, last, steps)
        found = {name: value.detach().contiguous() for name, value in told.items()}
        save_file(found, Path(output) / f"{Path(path).name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
