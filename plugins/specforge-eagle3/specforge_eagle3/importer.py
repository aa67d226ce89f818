"""Read a published EAGLE-3 checkpoint, whichever of the spellings in use it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specforge_core.drafts.dialects import from_layer_inputs
from specforge_core.drafts.tensors import FLOATS, check_given, check_options
from specforge_core.errors import CheckpointError
from specforge_core.hookspecs import hookimpl
from specforge_core.nn.rotary import stored_rope
from specforge_core.types import Draft, Export

from .config import DraftShape
from .export import ARCHITECTURES, SPECULATORS, published
from .frozen import Frozen, parts
from .head import VocabularyModel
from .model import Eagle3Model
from .vocab import check_map, members

EMBEDDING = "embed_tokens.weight"
KNOWN = {*ARCHITECTURES.values(), SPECULATORS, "Eagle3LlamaForCausalLM"}
SPELLINGS = {
    "draft_id_to_target_id": "d2t",
    "aux_norm_low.weight": "fc_norm.0.weight",
    "aux_norm_mid.weight": "fc_norm.1.weight",
    "aux_norm_high.weight": "fc_norm.2.weight",
}
NOT_TRAINED = ", which this package does not train. Try the target it was trained for: target.path"


@hookimpl
def specforge_import(draft: Draft, export: Export) -> bool:
    """Read a published checkpoint, in any of its spellings; its draft vocabulary too.

    Raises CheckpointError when it was made for another draft than the config describes.
    """
    if not KNOWN & set(export.config.get("architectures") or ()):
        return False
    model, frozen = parts(draft, Eagle3Model)
    layer = export.config.get("transformer_layer_config") or export.config
    if int(layer.get("num_hidden_layers", 1)) != 1:
        raise CheckpointError(
            f"the export has {layer['num_hidden_layers']} layers, and engines disagree on how "
            "more than one is served. Use a checkpoint of one layer"
        )
    check_config(model.shape, export.config)
    load_named(model, frozen, published_names(export.weights))
    return True


def load_named(
    model: VocabularyModel, frozen: Frozen, weights: dict[str, Tensor], remedy: str = NOT_TRAINED
) -> None:
    """Load tensors that have the published names, and the vocabulary they say.

    Raises CheckpointError where they are those of another draft; with `remedy` where the
    embedding was trained away from the target's, which engines share, and the model's is not.
    """
    shape, own = model.shape, model.state_dict()
    embedding = None if EMBEDDING in own else weights.pop(EMBEDDING, None)
    if embedding is not None and not _begins_with(embedding, frozen.embed_tokens):
        raise CheckpointError(f"the export has an embedding of its own, not the target's{remedy}")
    if "d2t" in weights or "t2d" in weights:
        d2t = check_map(weights, shape.draft_vocab_size, shape.vocab_size, "the export")
    elif shape.full_vocab:
        d2t = torch.zeros(shape.vocab_size, dtype=torch.int64)
    else:
        raise CheckpointError(
            f"the export has no d2t, so it drafts all {shape.vocab_size} tokens. "
            "Try: strategy.draft_vocab_size=full"
        )
    given = {**weights, "d2t": d2t, "t2d": members(d2t, shape.vocab_size)}
    check_given(given, {published(name): value for name, value in own.items()})
    model.load_state_dict({name: given[published(name)] for name in own})


def published_names(weights: Mapping[str, Tensor], first: str = "midlayer.") -> dict[str, Tensor]:
    """Return the tensors under the spelling of `published`; `first` begins the first layer's."""
    found = {}
    for name, value in weights.items():
        plain = re.sub(r"^(layers\.0|midlayer)\.", first, name.removeprefix("model."))
        found[SPELLINGS.get(plain, plain)] = value
    return found


def _begins_with(given: Tensor, own: Tensor) -> bool:
    """Say whether an export's embedding is the target's, in its own dtype and with any padding."""
    if given.shape[1:] != own.shape[1:] or len(given) < len(own) or given.dtype not in FLOATS:
        return False
    theirs, ours = given[: len(own)].to("cpu"), own.detach().to("cpu", given.dtype)
    return bool(torch.equal(theirs, ours))


def check_config(
    shape: DraftShape, given: Mapping[str, Any], unknown: tuple[str, ...] = ()
) -> None:
    """Compare everything that would load without an error and then be accepted nowhere.

    `unknown` are options of EAGLE-3 that a method has not.
    """
    layer: Mapping[str, Any] = given.get("transformer_layer_config") or given
    speculators = SPECULATORS in given.get("architectures", ())
    defaults = {"norm_before_residual": speculators, "norm_before_fc": False}
    for name, default in {**defaults, **dict.fromkeys(unknown, False)}.items():
        if given.get(name, default):
            raise CheckpointError(
                f"the export was trained with {name}, which this package does not know. "
                "Use another checkpoint"
            )
    if given.get("target_hidden_size") not in (None, shape.hidden_size):
        raise CheckpointError(
            f"the export reads states of size {given['target_hidden_size']}, this target's are of "
            f"size {shape.hidden_size}. Try the target it was trained for: target.path"
        )
    rope = stored_rope(layer)
    vocab = given.get("draft_vocab_size") or layer.get("vocab_size")
    pairs = {
        "num_layers": (int(layer.get("num_hidden_layers", 1)), shape.num_layers),
        "layers": (_layers(given, shape), list(shape.capture_layers)),
        "draft_vocab_size": (vocab, shape.draft_vocab_size),
        "fc_norm": (bool(given.get("fc_norm", given.get("use_aux_norm"))), shape.fc_norm),
        "norm_output": (bool(given.get("norm_output")), shape.norm_output),
        "num_heads": (layer.get("num_attention_heads"), shape.num_heads),
        "num_kv_heads": (layer.get("num_key_value_heads"), shape.num_kv_heads),
        "head_dim": (layer.get("head_dim", shape.head_dim), shape.head_dim),
        "intermediate_size": (layer.get("intermediate_size"), shape.intermediate_size),
        "rope_theta": (rope["rope_theta"], shape.rope["rope_theta"]),
    }
    of_target = {
        "hidden_size": (layer.get("hidden_size"), shape.hidden_size),
        "rms_norm_eps": (layer.get("rms_norm_eps"), shape.rms_norm_eps),
        "hidden_act": (layer.get("hidden_act"), "silu"),
        "rope parameters": (rope, dict(shape.rope)),
    }
    # what is not said is as engines take it
    said = [{n: pair for n, pair in x.items() if pair[0] is not None} for x in (pairs, of_target)]
    check_options(*said)


def _layers(given: Mapping[str, Any], shape: DraftShape) -> list[int]:
    """Return the captured layers by their outputs: those engines take where none are named.

    SGLang reads the one place, vLLM the other: of two that differ, the one that is not ours.
    """
    nested: Mapping[str, Any] = given.get("eagle_config") or {}
    found, ours = [], list(shape.capture_layers)
    if (ids := nested.get("eagle_aux_hidden_state_layer_ids")) is not None:
        found.append(list(ids))
    ids = given.get("eagle_aux_hidden_state_layer_ids", given.get("aux_hidden_state_layer_ids"))
    if ids is not None:
        found.append(from_layer_inputs(ids))
    if not found:
        return list(shape.published_layers)
    return next((layers for layers in found if layers != ours), ours)
