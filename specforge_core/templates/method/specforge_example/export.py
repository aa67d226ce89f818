"""Files for an engine, and the way back."""

from __future__ import annotations

from typing import Any

from specforge_core.errors import CheckpointError
from specforge_core.types import Draft, Export, TargetInfo

from .model import Blocks

CAUSES = {"draft_tokens": "it drafts another number of tokens than it has blocks for"}


def make_export(draft: Draft, target: TargetInfo) -> Export:
    """Return config.json and the trained weights."""
    return Export(
        config=_config(draft, target),
        weights=draft.model.state_dict(),
        causes=CAUSES,
        base=target.name_or_path,  # whose head it needs
    )


def load_export(draft: Draft, target: TargetInfo, export: Export) -> None:
    """Load an export's weights.  Raises CheckpointError when they are of another shape."""
    for key, wanted in _config(draft, target).items():
        if (found := export.config.get(key)) != wanted:
            raise CheckpointError(
                f"the export's {key} is {found!r}, this run's draft has {wanted!r}. "
                "Try: the strategy section it was trained with"
            )
    try:
        draft.model.load_state_dict(dict(export.weights))
    except RuntimeError as exc:
        raise CheckpointError(f"the export's weights do not fit: {exc}. Export again") from exc


def _config(draft: Draft, target: TargetInfo) -> dict[str, Any]:
    assert isinstance(draft.model, Blocks)
    return {
        "model_type": "specforge_example",
        "hidden_size": target.hidden_size,
        "draft_tokens": len(draft.model.blocks),
    }
