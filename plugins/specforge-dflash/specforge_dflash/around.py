"""What methods around a DFlash backbone share.

The model of such a method has the backbone as `backbone`, and beside it what the method adds,
under the published names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from specforge_core.drafts.tensors import check_given, written
from specforge_core.errors import ConfigError
from specforge_core.hookspecs import hookimpl
from specforge_core.types import (
    Batch,
    CaptureSpec,
    Draft,
    Export,
    Proposal,
    Sampling,
    TargetInfo,
)

from .collate import DFlashCollate
from .config import DFlashConfig
from .export import ARCHITECTURE, CAUSES, FORMATS, export_config, load_export
from .model import DFlashModel, Frozen

BACKBONE = "backbone."
Model = TypeVar("Model", bound=nn.Module)


def backbone_of(model: nn.Module) -> DFlashModel:
    """Return the backbone of a method's model."""
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, DFlashModel)
    return backbone


def parts(draft: Draft, model: type[Model]) -> tuple[Model, Frozen]:
    """Return a draft's model, which is of the type `model`, and what it reads of the target."""
    assert isinstance(draft.model, model)
    assert isinstance(draft.frozen, Frozen)
    return draft.model, draft.frozen


@hookimpl
def specforge_collate(config: DFlashConfig, spec: CaptureSpec, draft: Draft) -> DFlashCollate:
    """Make DFlash's batches."""
    return DFlashCollate(config, spec, backbone_of(draft.model).shape.mask_token_id)


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
        place = scores.argmax()
        if self._sampling.temperature > 0:
            probs = torch.softmax(scores / self._sampling.temperature, dim=-1)
            drawn = torch.multinomial(probs.cpu(), 1, generator=self._sampling.generator)
            place = drawn[0].to(scores.device)
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
    model: nn.Module,
    target: TargetInfo,
    format: str,
    *,
    architecture: str,
    own: Mapping[str, Any],
    serve: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, str | None],
    causes: Mapping[str, str],
) -> Export | None:
    """Return the files' contents: DFlash's, and what the method adds.

    `own` is added to `dflash_config`; `refused` says by engine why it would draft something else
    than was trained, which raises ConfigError.  None for a format that DFlash does not know.
    """
    if format not in FORMATS:
        return None
    if reason := refused.get(format):
        raise ConfigError(reason)
    out = export_config(config, backbone_of(model).shape, target)
    nested = {**out["dflash_config"], **own}
    weights = {name.removeprefix(BACKBONE): value for name, value in model.state_dict().items()}
    return Export(
        config={**out, "architectures": [architecture], "dflash_config": nested},
        weights=written(weights, config.export_dtype),
        serve={engine: how for engine, how in serve.items() if not refused.get(engine)},
        causes={**CAUSES, **causes},
    )


def load_around(
    config: DFlashConfig, model: nn.Module, export: Export, layout: Mapping[str, Any]
) -> None:
    """Load an export's tensors, `layout` being its config.json as DFlash would write it.

    Raises CheckpointError when it was made for another draft; nothing is loaded then.
    """
    own = {n: value for n, value in model.state_dict().items() if not n.startswith(BACKBONE)}
    given = {n: value for n, value in export.weights.items() if n in own}
    check_given(given, own)
    rest = {n: value for n, value in export.weights.items() if n not in own}
    plain = {**layout, "architectures": [ARCHITECTURE]}
    load_export(config, backbone_of(model), replace(export, config=plain, weights=rest))
    model.load_state_dict(given, strict=False)
