"""Runs where SGLang is installed: its own classes draft from an export of Domino, on a CPU.

python sglang_forward.py TARGET REQUEST.json PORT OUTPUT EXPORT...

specforge-sglang's export_forward.py, on PYTHONPATH, runs target and backbone; the chain is
drafted by SGLang's own rollout.  Writes OUTPUT/NAME.safetensors for each export.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from export_forward import dflash, load
from export_keys import prepare
from safetensors.torch import save_file
from sglang.srt.speculative.domino_utils import domino_greedy_rollout
from torch import Tensor


def rollout(draft: Any, target: Any, states: Tensor, last: int) -> dict[str, Tensor]:
    """Return the drafted tokens, and the correction of each but the first."""
    corrections: list[Tensor] = []
    hook = draft.embed_proj[2].register_forward_hook(
        lambda _module, _inputs, output: corrections.append(output)
    )
    tokens = domino_greedy_rollout(
        draft_hidden=states[None],
        bonus_tokens=torch.tensor([last]),
        target_embedding=target.get_input_embeddings(),
        lm_head_weight=target.get_embed_and_head()[1],
        prefix_gru=draft.prefix_gru,
        embed_proj=draft.embed_proj,
        vocab_size=target.config.vocab_size,
        shift_label=draft.shift_label,
        candidate_pool_size=0,
        in_cuda_graph=False,
    )
    hook.remove()
    return {"tokens": tokens[0], "corrections": torch.cat(corrections)}


def main(path: str, request: str, port: str, output: str, *exports: str) -> None:
    prepare(path, port)
    target = load(path)
    asked = json.loads(Path(request).read_text())
    for export in exports:
        draft = load(export)
        assert type(draft).__name__ == "DFlashDraftModel"
        told = dflash(draft, target, torch.tensor(asked["ids"]), asked["last"])
        told |= rollout(draft, target, told["states"], asked["last"])
        del told["logits"]
        found = {name: value.detach().contiguous() for name, value in told.items()}
        save_file(found, Path(output) / f"{Path(export).name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
