"""Runs where SGLang is installed: its own classes draft from an export of DFlash 2, on a CPU.

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
from torch import Tensor


def walk(draft: Any, target: Any, states: Tensor, last: int) -> dict[str, Tensor]:
    """Return candidates and scores behind every candidate of the slot before; the greedy walk."""
    draft.lm_head = target.lm_head
    ids, logits = draft.compute_candidates(states)
    scores = draft.candidate_selector.build_lattice(
        candidate_ids=ids[None],
        unary_logits=logits[None],
        hidden_states=states[None],
        anchor_token_ids=torch.tensor([last]),
    )
    tokens, _ = draft.candidate_selector.sample_path(
        candidate_ids=ids[None],
        scores=scores,
        uniforms=torch.zeros(1, len(states)),
        temperatures=torch.ones(1),
        greedy_mask=torch.ones(1, dtype=torch.bool),
    )
    return {"candidates": ids, "scores": scores[0], "tokens": tokens[0]}


def main(path: str, request: str, port: str, output: str, *exports: str) -> None:
    prepare(path, port)
    target = load(path)
    asked = json.loads(Path(request).read_text())
    for export in exports:
        draft = load(export)
        assert type(draft).__name__ == "DFlash2DraftModel"
        told = dflash(draft, target, torch.tensor(asked["ids"]), asked["last"])
        with torch.no_grad():
            told |= walk(draft, target, told["states"][1:], asked["last"])
        del told["logits"]
        found = {name: value.detach().contiguous() for name, value in told.items()}
        save_file(found, Path(output) / f"{Path(export).name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
