"""Runs where SGLang is installed: its own classes draft from an export of LiLiCorr, on a CPU.

python sglang_forward.py TARGET REQUEST.json PORT OUTPUT EXPORT...

specforge-sglang's export_forward.py, on PYTHONPATH, runs target and backbone; candidates, lattice
and walk are SGLang's own.  Writes OUTPUT/NAME.safetensors for each export.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what SGLang compiles computes the same without

import torch
from export_forward import dflash, load
from export_keys import prepare
from safetensors.torch import save_file
from sglang.srt.speculative.lilicorr_utils import lilicorr_candidates, propose_lilicorr_block
from torch import Tensor


def lattice(draft: Any, target: Any, states: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Return candidates, all scores with and without a token before the anchor, and the walk."""
    head, embed = draft.lilicorr, target.get_input_embeddings()
    anchor = draft.project_target_hidden(features)[-1:]
    log_probs, ids = lilicorr_candidates(
        hidden_states=states[1:], lm_head=target.lm_head, topk=head.candidate_topk
    )
    told = {"candidates": ids, "log_probs": log_probs}
    for name, there in (("", True), ("first_", False)):
        start, pairs = head.score(
            token_embeddings=embed(ids)[None, None],
            candidate_log_probs=log_probs[None, None],
            pass_hidden=states[None, None, 1:],
            anchor_hidden=anchor[None],
            anchor_valid=torch.tensor([[there]]),
        )
        start, pairs = head.log_factors(start, pairs)
        told |= {f"{name}start": start[0, 0], f"{name}pairs": pairs[0, 0]}
    tokens, _, _ = propose_lilicorr_block(
        head=head,
        draft_hidden=states[None],
        lm_head=target.lm_head,
        embed_tokens=embed,
        anchor=anchor,
    )
    return told | {"tokens": tokens[0]}


def main(path: str, request: str, port: str, output: str, *exports: str) -> None:
    prepare(path, port)
    target = load(path)
    asked = json.loads(Path(request).read_text())
    for export in exports:
        draft = load(export)
        assert type(draft).__name__ == "LiLiCorrDraftModel"
        told = dflash(draft, target, torch.tensor(asked["ids"]), asked["last"])
        with torch.no_grad():
            told |= lattice(draft, target, told["states"], told["features"])
        del told["logits"]
        found = {name: value.detach().contiguous() for name, value in told.items()}
        save_file(found, Path(output) / f"{Path(export).name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
