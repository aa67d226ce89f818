"""The published checkpoint layout, written for vLLM and read back.

It is EAGLE-3's with more layers, the learned state `mask_hidden` [1, 1, 3H] and the mask token.
Formats: `hf` (everything, the embedding too) and `vllm` (the embedding where it was trained;
SGLang serves no P-EAGLE).  vLLM finds layers with normed queries and keys by the speculators form.
"""

from __future__ import annotations

from dataclasses import replace

from specforge_eagle3.export import CAUSES, export_draft
from specforge_eagle3.frozen import parts
from specforge_eagle3.importer import check_config, load_named, published_names

from specforge_core.drafts.tensors import check_options
from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, TargetInfo

from .config import PeagleConfig
from .model import PeagleModel

NAMES = ("PEagleSpeculator", "peagle")  # the draft's class and the method, in that form
MASKS = ("pard_token", "mask_token_id", "ptd_token_id")  # where engines look for the mask token


@hookimpl
def specforge_export(
    config: PeagleConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and vllm; sglang is refused with the reason."""
    if format == "sglang":
        raise ConfigError(
            "SGLang drafts EAGLE-3 token by token, and has no P-EAGLE: it would leave the learned "
            "mask state out without a word. Try: --format vllm"
        )
    if format not in ("hf", "vllm"):
        return None
    given, length = parts(draft, PeagleModel), config.draft_tokens
    vllm = {"method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": length}
    made = export_draft(config, given, target, format, {"vllm": vllm}, NAMES)
    return replace(
        made,
        config={**made.config, **dict.fromkeys(MASKS, given[0].mask_token_id)},
        weights={**made.weights, "mask_hidden": made.weights["mask_hidden"].view(1, 1, -1)},
        # vLLM's second model runner refuses parallel drafting with EAGLE's method
        environment={"vllm": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
        causes={**CAUSES, **dict.fromkeys((*MASKS, "mask_hidden"), "mask token")},
    )


@hookimpl
def specforge_import(draft: Draft, export: Export) -> bool:
    """Read a published checkpoint, in any of its spellings; its draft vocabulary too.

    Raises CheckpointError when it was made for another draft than the config describes.
    """
    (model, frozen), given = parts(draft, PeagleModel), export.config
    weights = published_names(export.weights, "layers.0.")
    if "mask_hidden" not in weights and NAMES[0] not in (given.get("architectures") or ()):
        return False
    check_config(model.shape, given, unknown=("fc_norm", "use_aux_norm", "norm_output"))
    for mask in [given[name] for name in MASKS if given.get(name) is not None] or [None]:
        check_options({"mask_token_id": (mask, model.mask_token_id)})
    if model.embed_tokens is not None and "embed_tokens.weight" not in weights:
        check_options({"train_embedding": ("false", "true")})  # it reads the target's
    if "mask_hidden" in weights:
        weights["mask_hidden"] = weights["mask_hidden"].reshape(-1)
    remedy = ". Try: strategy.train_embedding=true, or the target it was trained for: target.path"
    load_named(model, frozen, weights, remedy)
    return True
