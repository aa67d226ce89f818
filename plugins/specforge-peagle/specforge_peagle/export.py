"""The published checkpoint layout, written for vLLM and read back.

It is EAGLE-3's with more layers, the learned state `mask_hidden` [1, 1, 3H] and the mask token.
Formats: `hf` (everything, the embedding too) and `vllm` (the embedding where it was trained;
SGLang serves no P-EAGLE).  vLLM finds layers with normed queries and keys by the speculators form.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from specforge_eagle3.export import CAUSES, export_config, plain, speculators_config
from specforge_eagle3.frozen import Frozen
from specforge_eagle3.importer import check_config, check_embedding, stored_map
from specforge_eagle3.vocab import members
from torch import Tensor

from specforge_core.drafts.tensors import check_given, readable_config
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.types import Draft, Export, TargetInfo

from .config import PeagleConfig
from .model import PeagleModel

OWN_SPECULATORS = "PEagleSpeculator"
MASKS = ("pard_token", "mask_token_id", "ptd_token_id")  # where engines look for the mask token
OWN_CAUSES = {**dict.fromkeys(MASKS, "mask token"), "mask_hidden": "mask token"}


def published(name: str) -> str:
    """Return the published name of one of the model's tensors."""
    name = re.sub(r"\.(before|after)\.([qkvo]_(?:proj|norm))", r".self_attn.\2", name)
    name = re.sub(r"\.after\.(\w+_proj)", r".mlp.\1", name)
    return re.sub(r"^(layers\.\d+)\.(before|after)\.", r"\1.", name)


def export_draft(
    config: PeagleConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Return the files' contents; None for a format this package does not know."""
    model, frozen = draft.model, draft.frozen
    assert isinstance(model, PeagleModel)
    assert isinstance(frozen, Frozen)
    if format == "sglang":
        raise ConfigError(
            "SGLang drafts EAGLE-3 token by token, and has no P-EAGLE: it would leave the learned "
            "mask state out without a word. Try: --format vllm"
        )
    if format not in ("hf", "vllm"):
        return None
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    weights = {published(name): plain(value, dtype) for name, value in model.state_dict().items()}
    weights["mask_hidden"] = weights["mask_hidden"].view(1, 1, -1)
    speculators = format == "vllm" and model.shape.qk_norm
    if model.embed_tokens is None and (format == "hf" or speculators):
        weights["embed_tokens.weight"] = plain(frozen.embed_tokens, dtype)
    serve = {
        "method": "eagle3",
        "parallel_drafting": True,
        "num_speculative_tokens": config.draft_tokens,
    }
    return Export(
        config=_config(config, model, target, speculators),
        weights=weights,
        serve={"vllm": serve},
        causes={**CAUSES, **OWN_CAUSES},
        base=target.name_or_path,
    )


def _config(
    config: PeagleConfig, model: PeagleModel, target: TargetInfo, speculators: bool
) -> dict[str, Any]:
    """Return config.json: EAGLE-3's, with what is P-EAGLE's own."""
    shape = model.shape
    mask = dict.fromkeys(MASKS, shape.mask_token_id)
    depth = {"num_hidden_layers": shape.num_layers}
    if not speculators:
        return {**export_config(config.eagle3, shape, target), **depth, **mask}
    out = speculators_config(config.eagle3, shape, target)
    return {
        **out,
        **mask,
        "architectures": [OWN_SPECULATORS],
        "speculators_model_type": "peagle",
        "speculators_config": {**out["speculators_config"], "algorithm": "peagle"},
        "transformer_layer_config": {**out["transformer_layer_config"], **depth},
        "embed_requires_grad": config.train_embedding,
    }


def load_draft(draft: Draft, export: Export) -> bool:
    """Load an export into `draft`, its draft vocabulary too.

    Raises CheckpointError when it was made for another draft than the config describes.
    """
    model, frozen, given = draft.model, draft.frozen, export.config
    assert isinstance(model, PeagleModel)
    assert isinstance(frozen, Frozen)
    weights = _own_names(export.weights)
    if "mask_hidden" not in weights and OWN_SPECULATORS not in (given.get("architectures") or ()):
        return False
    shape = model.shape
    with readable_config():
        layer = given.get("transformer_layer_config") or given
        masks = [given[name] for name in MASKS if given.get(name) is not None] or [None]
        theirs = {
            "num_layers": int(layer.get("num_hidden_layers", 1)),
            # of several that differ, one that is not ours
            "mask_token_id": next((m for m in masks if m != shape.mask_token_id), masks[0]),
        }
        for name in ("fc_norm", "use_aux_norm", "norm_output"):
            if given.get(name):
                raise CheckpointError(
                    f"the export was trained with {name}, which P-EAGLE drafts here do not have. "
                    "Use another checkpoint"
                )
        one = {**layer, "num_hidden_layers": 1}  # what EAGLE-3 compares is the first layer's
        check_config(shape, {**given, **one, "transformer_layer_config": one})
    for name, value in theirs.items():
        if value != (ours := getattr(shape, name)):
            raise CheckpointError(
                f"the export has {name} {value}, this run {ours}. Try: strategy.{name}={value}"
            )
    embedding = weights.get("embed_tokens.weight")
    if model.embed_tokens is None and embedding is not None:
        try:
            check_embedding(weights.pop("embed_tokens.weight"), frozen.embed_tokens)
        except CheckpointError as exc:
            raise CheckpointError(
                "the export has an embedding of its own, not the target's. "
                "Try: strategy.train_embedding=true, or the target it was trained for: target.path"
            ) from exc
    elif model.embed_tokens is not None and embedding is None:
        raise CheckpointError(
            "the export has no embedding: it reads the target's. "
            "Try: strategy.train_embedding=false"
        )
    d2t = stored_map(weights, shape)
    weights |= {"d2t": d2t, "t2d": members(d2t, shape.vocab_size)}
    own = {published(name): value for name, value in model.state_dict().items()}
    check_given(weights, own)
    model.load_state_dict({name: weights[published(name)] for name in model.state_dict()})
    return True


def _own_names(given: Any) -> dict[str, Tensor]:
    """Return the tensors as `published` names them, whichever of the spellings they have."""
    found = {}
    for name, value in given.items():
        plain = name.removeprefix("model.").replace("midlayer.", "layers.0.")
        plain = {"draft_id_to_target_id": "d2t"}.get(plain, plain)
        found[plain] = value.reshape(-1) if plain == "mask_hidden" else value
    return found
