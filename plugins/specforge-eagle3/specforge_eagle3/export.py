"""The published checkpoint layout, written for engines.

Formats: `hf` (everything, the embedding too), `sglang` and `vllm` (what these load; the
embedding is the target's).  Layer ids are written in both dialects: SGLang reads the nested
field, which counts outputs, vLLM the top-level one, which counts inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from specforge_core.drafts.dialects import layer_inputs
from specforge_core.drafts.tensors import written
from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.nn.decoder import decoder_config
from specforge_core.types import Draft, Export, TargetInfo

from .config import DraftShape, Eagle3Config, VocabularyOptions
from .frozen import Frozen, parts
from .head import VocabularyModel
from .model import Eagle3Model

FORMATS = ("hf", "sglang", "vllm")
ARCHITECTURES = {False: "LlamaForCausalLMEagle3", True: "Eagle3Qwen3ForCausalLM"}  # by qk_norm
SPECULATORS = "Eagle3Speculator"
NAMES = (SPECULATORS, "eagle3")  # the draft's class and the method, in the speculators form
SPECULATORS_VERSION = "0.3.0"

# key of config.json, or tensor -> what goes wrong where it differs, for the method's own keys;
# first what is most likely to
CAUSES = {
    **dict.fromkeys(("eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"), "layer ids"),
    **dict.fromkeys(("fc_norm", "norm_output", "norm_before_residual", "norm_before_fc"), "norms"),
    **dict.fromkeys(("d2t", "t2d", "draft_id_to_target_id"), "vocabulary map"),
    **dict.fromkeys(("draft_vocab_size", "vocab_size"), "vocabulary map"),
    "speculative_tokens": "block size",
}


def published(name: str) -> str:
    """Return the published name of one of the model's tensors."""
    name = re.sub(r"^(before|after)\.(?!norm\.)", r"midlayer.\1.", name)  # of the only layer
    name = re.sub(r"\.(before|after)\.([qkvo]_(?:proj|norm))", r".self_attn.\2", name)
    name = re.sub(r"\.after\.(\w+_proj)", r".mlp.\1", name)
    return re.sub(r"\b(before|after)\.", "", name)


@hookimpl
def specforge_export(
    config: Eagle3Config, draft: Draft, target: TargetInfo, format: str
) -> Export | None:
    """Write the published layout: formats hf, sglang, vllm.

    Raises ConfigError where the engine would serve something else than was trained.
    """
    if format not in FORMATS:
        return None
    given = parts(draft, Eagle3Model)
    shape = given[0].shape
    if format == "sglang" and shape.qk_norm:
        raise ConfigError(
            "SGLang serves EAGLE-3 drafts without norms on queries and keys, and leaves this "
            "draft's out without a word: little would be accepted. Try: --format vllm, or train "
            "with strategy.layer_type=llama"
        )
    return export_draft(config, given, target, format, serving_options(config, shape))


def export_draft(
    config: VocabularyOptions,
    given: tuple[VocabularyModel, Frozen],
    target: TargetInfo,
    format: str,
    serve: Mapping[str, Mapping[str, Any]],
    names: tuple[str, str] = NAMES,
) -> Export:
    """Return the files' contents; the embedding is the target's unless the model has its own.

    `serve` is what each engine is started with, `names` as `speculators_config` says.
    """
    model, frozen = given
    weights = {published(name): value for name, value in model.state_dict().items()}
    own = "embed_tokens.weight" in weights
    made = export_config(config, model.shape, target)
    if speculators := format == "vllm" and model.shape.qk_norm:
        weights = {name.replace("midlayer.", "layers.0."): v for name, v in weights.items()}
        length = serve["vllm"]["num_speculative_tokens"]
        made = speculators_config(config, model.shape, target, length, names)
        made["embed_requires_grad"] = own
    if not own and (format == "hf" or speculators):
        weights["embed_tokens.weight"] = frozen.embed_tokens
    return Export(
        config=made,
        weights=written(weights, config.export_dtype),
        serve=serve,
        causes=CAUSES,
        base=target.name_or_path,
    )


def serving_options(config: Eagle3Config, shape: DraftShape) -> dict[str, dict[str, Any]]:
    """Return what each engine that knows this draft is started with; a tree is SGLang's alone."""
    length, tree = config.draft_length, config.tree_top_k > 1
    sglang = {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": length,
        "speculative_eagle_topk": config.tree_top_k,
        # the last verified token is counted too
        "speculative_num_draft_tokens": 1 + (config.tree_tokens if tree else length),
    }
    vllm = {"method": "eagle3", "num_speculative_tokens": length}
    return {"vllm": vllm} if shape.qk_norm else {"sglang": sglang, "vllm": vllm}


def export_config(
    config: VocabularyOptions, shape: DraftShape, target: TargetInfo
) -> dict[str, Any]:
    """Return config.json."""
    ids = list(shape.capture_layers)
    return {
        "architectures": [ARCHITECTURES[shape.qk_norm]],
        **layer_config(config, shape, target),
        "draft_vocab_size": shape.draft_vocab_size,  # without it engines take the target's head
        "num_aux_hidden_states": len(ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        **_semantics(shape),
    }


def layer_config(
    config: VocabularyOptions, shape: DraftShape, target: TargetInfo
) -> dict[str, Any]:
    """Return the part that describes the decoder layers."""
    special = {n: target.config.get(n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "num_hidden_layers": shape.num_layers,
        **decoder_config(shape),
        "mlp_bias": False,
        "dtype": config.export_dtype,
        "torch_dtype": config.export_dtype,
        **{name: value for name, value in special.items() if value is not None},
    }


def speculators_config(
    config: VocabularyOptions,
    shape: DraftShape,
    target: TargetInfo,
    draft_length: int,
    names: tuple[str, str] = NAMES,
) -> dict[str, Any]:
    """Return config.json in the form by which vLLM finds layers with normed queries and keys.

    `names` are those of the draft's class and of the method.
    """
    verifier = {
        "name_or_path": target.name_or_path,
        "architectures": target.config.get("architectures") or [],
    }
    proposal = {"proposal_type": "greedy", "speculative_tokens": draft_length}
    return {
        "architectures": [names[0]],
        "speculators_model_type": names[1],
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": names[1],
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": layer_config(config, shape, target),
        "draft_vocab_size": shape.draft_vocab_size,
        "target_hidden_size": None,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": config.export_dtype,
        **_semantics(shape),
    }


def _semantics(shape: DraftShape) -> dict[str, Any]:
    """What engines and formats have different defaults for, so all of it is written."""
    return {
        "eagle_aux_hidden_state_layer_ids": layer_inputs(shape.capture_layers),
        "fc_norm": shape.fc_norm,
        "norm_output": shape.norm_output,
        "norm_before_residual": False,
        "norm_before_fc": False,
    }
