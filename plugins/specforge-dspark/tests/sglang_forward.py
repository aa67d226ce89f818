"""Runs where SGLang is installed: its own classes draft from an export of DSpark, on a CPU.

python sglang_forward.py TARGET REQUEST.json PORT OUTPUT EXPORT...

specforge-sglang's export_forward.py, on PYTHONPATH, runs target and backbone.  Logits, the heads
and the reading of sts.json are SGLang's; its loop over a block's tokens, which needs a GPU, is
written out here.  Writes OUTPUT/NAME.safetensors for each export.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what SGLang compiles computes the same without
os.environ["SGLANG_RAGGED_VERIFY_MODE"] = "compact"  # the one that has a confidence head

import torch
from export_forward import dflash, load
from export_keys import prepare
from safetensors.torch import save_file
from sglang.srt.speculative.dspark_components.dspark_sts import load_sts_calibration_from_path
from torch import Tensor


def block(draft: Any, target: Any, states: Tensor, last: int) -> dict[str, Tensor]:
    """Return the greedy chain, its logits and its calibrated confidences."""
    embedding = target.get_input_embeddings()
    draft.attach_shared_modules(embed_tokens=embedding, lm_head=target.lm_head)
    base, features = draft.compute_base_logits(states)
    markov = draft.markov_head
    state, token, logits, tokens = markov.init_state(states[:1]), torch.tensor([last]), [], []
    for slot, own in zip(states, base, strict=True):
        bias, state = markov.step_bias(token, hidden_states=slot[None], state=state)
        logits.append(own + bias[0])
        token = logits[-1].argmax(dim=-1, keepdim=True)
        tokens.append(token)
    chain = torch.cat(tokens)
    confidence, _ = draft.compute_confidence(
        anchor_tokens=torch.tensor([last]),
        draft_tokens=chain[None],
        confidence_features=features,
    )
    return {"logits": torch.stack(logits), "tokens": chain, "confidences": confidence[0]}


def main(path: str, request: str, port: str, output: str, *exports: str) -> None:
    prepare(path, port)
    target = load(path)
    asked = json.loads(Path(request).read_text())
    for export in exports:
        draft = load(export)
        assert type(draft).__name__ == "Qwen3DSparkModel"
        slots = draft.gamma if draft.sample_from_anchor else draft.gamma + 1
        draft.set_block_size(slots)
        if (Path(export) / "sts.json").exists():
            found = load_sts_calibration_from_path(str(Path(export) / "sts.json"))
            draft.confidence_head.sts_temperatures = torch.tensor(found.temperatures)
        told = dflash(draft, target, torch.tensor(asked["ids"]), asked["last"])
        with torch.no_grad():
            told |= block(draft, target, told["states"][slots - draft.gamma :], asked["last"])
        made = {name: value.detach().contiguous() for name, value in told.items()}
        save_file(made, Path(output) / f"{Path(export).name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
