"""The published checkpoint layout, written for vLLM and read back.

It is EAGLE-3's with more layers, the learned state `mask_hidden` [1, 1, 3H] and the mask token.
Formats: `hf` (everything, the embedding too) and `vllm` (the embedding where it was trained;
SGLang serves no P-EAGLE).  vLLM finds layers with normed queries and keys by the speculators form.
"""

from __future__ import annotations

from specforge_eagle3.export import CAUSES, export_config, published, speculators_config
from specforge_eagle3.frozen import parts
from specforge_eagle3.importer import check_config, check_embedding, load_named, published_names

from specforge_core.drafts.tensors import check_options, written
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, TargetInfo

from .config import PeagleConfig
from .model import PeagleModel

OWN_SPECULATORS = "PEagleSpeculator"
MASKS = ("pard_token", "mask_token_id", "ptd_token_id")  # where engines look for the mask token
NOT_THE_TARGETS = (
    ". Try: strategy.train_embedding=true, or the target it was trained for: target.path"
)


@hookimpl
def specforge_export(
    config: PeagleConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and vllm; sglang is refused with the reason."""
    model, frozen = parts(draft, PeagleModel)
    if format == "sglang":
        raise ConfigError(
            "SGLang drafts EAGLE-3 token by token, and has no P-EAGLE: it would leave the learned "
            "mask state out without a word. Try: --format vllm"
        )
    if format not in ("hf", "vllm"):
        return None
    weights = {published(name): value for name, value in model.state_dict().items()}
    weights["mask_hidden"] = model.mask_hidden.view(1, 1, -1)
    shape, length = model.shape, config.draft_tokens
    speculators = format == "vllm" and shape.qk_norm
    if model.embed_tokens is None and (format == "hf" or speculators):
        weights["embed_tokens.weight"] = frozen.embed_tokens
    made = export_config(config, shape, target)
    if speculators:
        made = speculators_config(config, shape, target, length, (OWN_SPECULATORS, "peagle"))
        made["embed_requires_grad"] = config.train_embedding
    serve = {"method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": length}
    return Export(
        config={**made, **dict.fromkeys(MASKS, model.mask_token_id)},
        weights=written(weights, config.export_dtype),
        serve={"vllm": serve},
        causes={**CAUSES, **dict.fromkeys((*MASKS, "mask_hidden"), "mask token")},
        base=target.name_or_path,
    )


@hookimpl
def specforge_import(draft: Draft, export: Export) -> bool:
    """Read a published checkpoint, in any of its spellings; its draft vocabulary too.

    Raises CheckpointError when it was made for another draft than the config describes.
    """
    (model, frozen), given = parts(draft, PeagleModel), export.config
    named = published_names(export.weights)
    weights = {name.replace("midlayer.", "layers.0."): value for name, value in named.items()}
    if "mask_hidden" not in weights and OWN_SPECULATORS not in (given.get("architectures") or ()):
        return False
    check_config(model.shape, given, unknown=("fc_norm", "use_aux_norm", "norm_output"))
    ours = model.mask_token_id
    masks = [given[name] for name in MASKS if given.get(name) is not None] or [None]
    # of several that differ, one that is not ours
    check_options({"mask_token_id": (next((m for m in masks if m != ours), ours), ours)})
    if model.embed_tokens is None:
        if (embedding := weights.pop("embed_tokens.weight", None)) is not None:
            check_embedding(embedding, frozen.embed_tokens, NOT_THE_TARGETS)
    elif "embed_tokens.weight" not in weights:
        raise CheckpointError(
            "the export has no embedding: it reads the target's. "
            "Try: strategy.train_embedding=false"
        )
    if "mask_hidden" in weights:
        weights["mask_hidden"] = weights["mask_hidden"].reshape(-1)
    load_named(model, weights)
    return True
