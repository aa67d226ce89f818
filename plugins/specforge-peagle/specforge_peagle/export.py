"""The published checkpoint layout, written for vLLM and read back.

It is EAGLE-3's with more layers, the learned state `mask_hidden` [1, 1, 3H] and the mask token.
Formats: `hf` (everything, the embedding too) and `vllm` (the embedding where it was trained;
SGLang serves no P-EAGLE).  vLLM finds layers with normed queries and keys by the speculators form.
"""

from __future__ import annotations

import re
from typing import Any

from specforge_eagle3.export import CAUSES, export_config, speculators_config
from specforge_eagle3.frozen import Frozen
from specforge_eagle3.importer import check_config, check_embedding, load_named, published_names

from specforge_core.drafts.tensors import check_options, written
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.hookspecs import hookimpl
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


@hookimpl
def specforge_export(
    config: PeagleConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and vllm; sglang is refused with the reason."""
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
    weights = {published(name): value for name, value in model.state_dict().items()}
    weights["mask_hidden"] = model.mask_hidden.view(1, 1, -1)
    speculators = format == "vllm" and model.shape.qk_norm
    if model.embed_tokens is None and (format == "hf" or speculators):
        weights["embed_tokens.weight"] = frozen.embed_tokens
    serve = {
        "method": "eagle3",
        "parallel_drafting": True,
        "num_speculative_tokens": config.draft_tokens,
    }
    return Export(
        config=_config(config, model, target, speculators),
        weights=written(weights, config.export_dtype),
        serve={"vllm": serve},
        causes={**CAUSES, **OWN_CAUSES},
        base=target.name_or_path,
    )


def _config(
    config: PeagleConfig, model: PeagleModel, target: TargetInfo, speculators: bool
) -> dict[str, Any]:
    """Return config.json: EAGLE-3's, with what is P-EAGLE's own."""
    shape, length = model.shape, config.draft_tokens
    mask = dict.fromkeys(MASKS, shape.mask_token_id)
    if not speculators:
        return {**export_config(config, shape, target), **mask}
    out = speculators_config(config, shape, target, length, (OWN_SPECULATORS, "peagle"))
    return {**out, **mask, "embed_requires_grad": config.train_embedding}


@hookimpl
def specforge_import(draft: Draft, export: Export) -> bool:
    """Read a published checkpoint, in any of its spellings; its draft vocabulary too.

    Raises CheckpointError when it was made for another draft than the config describes.
    """
    model, frozen, given = draft.model, draft.frozen, export.config
    assert isinstance(model, PeagleModel)
    assert isinstance(frozen, Frozen)
    named = published_names(export.weights)
    weights = {name.replace("midlayer.", "layers.0."): value for name, value in named.items()}
    if "mask_hidden" not in weights and OWN_SPECULATORS not in (given.get("architectures") or ()):
        return False
    check_config(model.shape, given, unknown=("fc_norm", "use_aux_norm", "norm_output"))
    ours = model.shape.mask_token_id
    masks = [given[name] for name in MASKS if given.get(name) is not None] or [None]
    # of several that differ, one that is not ours
    check_options({"mask_token_id": (next((m for m in masks if m != ours), ours), ours)})
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
    if "mask_hidden" in weights:
        weights["mask_hidden"] = weights["mask_hidden"].reshape(-1)
    load_named(model, weights, published)
    return True
