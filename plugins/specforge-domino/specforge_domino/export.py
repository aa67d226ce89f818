"""The published checkpoint layout, written for engines and read back.

It is DFlash's, with the correction's tensors and their sizes in `dflash_config`.  Formats: `hf`
(the published layout) and `sglang` (the same files, refused where it would serve something else).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specforge_dflash.around import export_around, load_around
from specforge_dflash.export import ARCHITECTURE
from specforge_dflash.model import parts

from specforge_core.drafts.tensors import check_options
from specforge_core.errors import CheckpointError
from specforge_core.hookspecs import hookimpl
from specforge_core.types import Draft, Export, TargetInfo

from .config import DominoConfig
from .model import DominoModel

ARCHITECTURES = (ARCHITECTURE, "DominoDraftModel")  # what engines load, and another spelling
OPTIONS = {name: name for name in ("gru_hidden_dim", "emb_dim", "pure_draft_prefix_len")}
# key of config.json -> what goes wrong where it differs, for the correction's own keys
OWN_CAUSES = {
    "shift_label": "label layout",
    **dict.fromkeys(("projector_type", *OPTIONS), "logit correction"),
}
NOT_IN_VLLM = (
    "vLLM does not correct the logits of a block, and would draft without this draft's "
    "correction. Try: --format sglang"
)
# all tokens, as trained; by itself SGLang corrects the 2048 that the backbone likes best
SGLANG = {"speculative_algorithm": "DFLASH", "speculative_domino_candidate_pool_size": 0}


@hookimpl
def specforge_export(
    config: DominoConfig, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf and sglang; vllm is refused with the reason."""
    shifted = config.label_layout == "next_token"
    made = export_around(
        config,
        draft,
        target,
        format,
        architecture=ARCHITECTURE,
        options=OPTIONS,
        own={"projector_type": "domino", "shift_label": shifted},
        serve={"sglang": SGLANG},
        refused={"sglang": _not_in_sglang(config), "vllm": NOT_IN_VLLM},
        causes=OWN_CAUSES,
    )
    if made is None:
        return None
    # read from either place, and must agree
    return replace(made, config={**made.config, "emb_dim": config.emb_dim})


def _not_in_sglang(config: DominoConfig) -> str | None:
    """Return why SGLang would draft something else than was trained."""
    if config.pure_draft_prefix_len == 1:
        return None
    return (
        f"SGLang leaves one drafted token uncorrected, and this draft was trained with "
        f"pure_draft_prefix_len {config.pure_draft_prefix_len}. Try: --format hf, or train "
        "with strategy.pure_draft_prefix_len=1"
    )


@hookimpl
def specforge_import(config: DominoConfig, draft: Draft, export: Export) -> bool:
    """Read the published layout back.  Raises CheckpointError when it is another draft's."""
    (model, _), given = parts(draft, DominoModel), export.config
    nested, names = given.get("dflash_config"), given.get("architectures") or ()
    if not isinstance(nested, Mapping) or not any(name in names for name in ARCHITECTURES):
        return False
    said = {**given, **nested}  # engines read either place
    if said.get("projector_type") != "domino":
        return False
    _check(config, said, given)
    layout = {**nested, "label_layout": config.label_layout}  # compared above, as published
    layout |= {name: said.get(name) for name in OPTIONS}
    load_around(config, model, export, {**given, "dflash_config": layout}, OPTIONS)
    return True


def _check(config: DominoConfig, said: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
    """Compare what would load without an error and then draft something else."""
    shifted = said.get("shift_label")
    if not isinstance(shifted, bool):
        raise CheckpointError(
            f"config.json of the export has shift_label {shifted!r}, which says what its slots "
            "predict: it must be true or false. Add it as the draft was trained"
        )
    layout = "next_token" if shifted else "same_position"
    check_options({"label_layout": (layout, config.label_layout)})
    check_options({"emb_dim": (outer.get("emb_dim", config.emb_dim), config.emb_dim)})  # both alike
