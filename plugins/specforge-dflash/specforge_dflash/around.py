"""What methods around a DFlash backbone share.

The model of such a method has the backbone as `backbone`, and beside it what the method adds,
under the published names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from specforge_core.drafts.tensors import check_given, check_options, written
from specforge_core.errors import ConfigError
from specforge_core.nn.sampling import sample
from specforge_core.types import Batch, Draft, Export, Proposal, Sampling, TargetInfo

from .config import Config, DFlashConfig
from .export import (
    ARCHITECTURE,
    CAUSES,
    FORMATS,
    export_config,
    load_export,
    target_not_served,
)
from .model import DFlashModel, Frozen, Model, backbone_of, parts
from .proposer import DFlashProposer

BACKBONE = "backbone."


def slot_states(backbone: DFlashModel, frozen: Frozen, batch: Batch) -> Tensor:
    """Return the final states [b, N, H] of a batch's slots, normed."""
    states: Tensor = backbone(
        batch["hidden_states"],
        frozen.embed(batch["block_ids"].flatten(1)),
        batch["anchors"],
        batch["starts"],
        batch["position_ids"],
    )
    return states


class AroundProposer(DFlashProposer[Config], Generic[Config, Model]):
    """Base of proposers with a model of their method's, `_draft`."""

    def __init__(self, config: Config, model: Model, frozen: Frozen) -> None:
        super().__init__(config, backbone_of(model), frozen)
        self._draft = model


class Walk:
    """A draft whose tokens are drawn one after the other."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._tokens: list[Tensor] = []
        self._probs: list[Tensor] = []

    def draw(self, scores: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the place (a scalar) of one of scores [K]: the best, or drawn with a softmax.

        They are scores of the tokens ids [K], or of all tokens.
        """
        place, probs = sample(scores, self._sampling)
        if probs is not None:
            if ids is not None:
                probs = probs.new_zeros(self._vocab_size).scatter_(0, ids, probs)
            self._probs.append(probs.float())
        self._tokens.append(place if ids is None else ids[place])
        return place

    def proposal(self) -> Proposal:
        """Return what was drawn."""
        probs = torch.stack(self._probs) if self._probs else None
        return Proposal(tokens=torch.stack(self._tokens), probs=probs)


def export_around(
    config: DFlashConfig,
    draft: Draft,
    target: TargetInfo,
    format: str,
    *,
    architecture: str,
    options: Mapping[str, str],
    own: Mapping[str, Any],
    serve: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, str | None],
    causes: Mapping[str, str],
    environment: Mapping[str, Mapping[str, str]] | None = None,
) -> Export | None:
    """Return the files' contents: DFlash's, and what the method adds.

    `options` maps the method's own to their keys in `dflash_config`, where `own` is added too, and
    stands for what is said twice; `refused` says by engine why it would draft something else
    than was trained, besides `target_not_served`: ConfigError where it is asked for.  None for a
    format that DFlash does not know.
    """
    if format not in FORMATS:
        return None
    model, frozen = parts(draft, nn.Module)
    why = {e: refused.get(e) or target_not_served(frozen, target, e) for e in FORMATS if e != "hf"}
    if reason := why.get(format):
        raise ConfigError(reason)
    out = export_config(config, backbone_of(model).shape, target)
    told = {key: getattr(config, name) for name, key in options.items()}
    nested = {**out["dflash_config"], **told, **own}
    weights = {name.removeprefix(BACKBONE): value for name, value in model.state_dict().items()}
    return Export(
        config={**out, "architectures": [architecture], "dflash_config": nested},
        weights=written(weights, config.export_dtype),
        serve={engine: how for engine, how in serve.items() if not why.get(engine)},
        environment=environment or {},
        causes={**CAUSES, **causes},
    )


def load_around(
    config: DFlashConfig,
    model: nn.Module,
    export: Export,
    layout: Mapping[str, Any],
    options: Mapping[str, str],
) -> None:
    """Load an export's tensors, `layout` being its config.json as `export_around` would write it.

    `options` are those that are compared, mapped to their keys in `dflash_config`.

    Raises CheckpointError when it was made for another draft; nothing is loaded then.
    """
    said = layout.get("dflash_config") or {}
    check_options({name: (said.get(key), getattr(config, name)) for name, key in options.items()})
    own = {n: value for n, value in model.state_dict().items() if not n.startswith(BACKBONE)}
    given = {n: value for n, value in export.weights.items() if n in own}
    check_given(given, own)
    rest = {n: value for n, value in export.weights.items() if n not in own}
    plain = {**layout, "architectures": [ARCHITECTURE]}
    load_export(config, backbone_of(model), replace(export, config=plain, weights=rest))
    model.load_state_dict(given, strict=False)
