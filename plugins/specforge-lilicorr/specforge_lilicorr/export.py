"""The published checkpoint layout, written for engines and read back: DFlash's and a lattice."""

from __future__ import annotations

from specforge_dflash.around import export_around, load_around
from specforge_dflash.export import serving_options
from specforge_dflash.model import parts
from specforge_dflash2.export import not_walked

from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, TargetInfo

from .config import LiLiCorrConfig
from .model import LiLiCorrModel

ARCHITECTURE = "LiLiCorrDraftModel"
MOST_CANDIDATES = 16  # of a slot, that SGLang's kernel walks over
# option -> its key in dflash_config; no engine has a default for them
OPTIONS = {
    "candidate_top_k": "lilicorr_candidate_topk",
    "lattice_hidden_size": "lilicorr_hidden_size",
    "lattice_layers": "lilicorr_num_layers",
    "lattice_heads": "lilicorr_num_heads",
    "lattice_mlp_ratio": "lilicorr_mlp_ratio",
    "factor_dim": "lilicorr_factor_dim",
    "vector_eps": "lilicorr_vector_eps",
    "logit_scale": "lilicorr_logit_scale",
}
CONVOLUTIONS = {name: name for name in ("conv_kernel_size", "conv_group_size")}
CAUSES = {
    **dict.fromkeys(("lilicorr_enabled", *OPTIONS.values()), "lattice"),
    **dict.fromkeys(CONVOLUTIONS, "convolutions"),
}


@hookimpl
def specforge_export(
    config: LiLiCorrConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and sglang; vllm is refused with the reason."""
    return export_around(
        config,
        draft,
        target,
        format,
        architecture=ARCHITECTURE,
        options=OPTIONS | (CONVOLUTIONS if config.conv_kernel_size else {}),
        own={"lilicorr_enabled": True},
        serve=serving_options(config),
        refused={
            "sglang": not_walked(config, "candidate_top_k", MOST_CANDIDATES)
            or _not_described(draft, target),
            "vllm": "vLLM has no class for LiLiCorr drafts. Try: --format sglang",
        },
        causes=CAUSES,
        environment={"sglang": {"SGLANG_ENABLE_LILICORR_SAMPLING": "1"}},
    )


def _not_described(draft: Draft, target: TargetInfo) -> str | None:
    """Return what of the target SGLang leaves out of the candidates' features."""
    _, frozen = parts(draft, LiLiCorrModel)
    if frozen.scale != 1.0:
        does = f"multiplies its embeddings by {frozen.scale:g}"
    elif frozen.softcap is not None:
        does = f"caps its logits at {frozen.softcap:g}"
    else:
        return None
    return (
        f"target {target.name_or_path!r} {does}, and SGLang's candidates are described without "
        "that: other tokens would be picked than in training. Try: --format hf"
    )


@hookimpl
def specforge_import(config: LiLiCorrConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, LiLiCorrModel), export.config
    if ARCHITECTURE not in (given.get("architectures") or ()):
        return False
    nested = dict(given.get("dflash_config") or {})
    nested |= {name: nested.get(name) or 0 for name in CONVOLUTIONS}
    width, ours = OPTIONS["lattice_hidden_size"], config.lattice_hidden_size
    if {nested.get(width), ours} == {0, model.backbone.shape.hidden_size}:
        nested[width] = ours  # 0 is the draft's width
    load_around(config, model, export, {**given, "dflash_config": nested}, OPTIONS | CONVOLUTIONS)
    return True
