"""DFlash with its loss on the first slots of each block only: a variant of a method."""

from __future__ import annotations

from collections.abc import Sequence

import specforge_dflash
from pydantic import Field
from specforge_dflash import (  # noqa: F401  # a hook is found by its name
    specforge_adapter,
    specforge_draft,
    specforge_export,
    specforge_import,
    specforge_proposer,
    specforge_train_step,
    specforge_transform,
    specforge_verify_capture,
    train_slots,
)
from specforge_dflash.config import DFlashConfig

from specforge_core import hookimpl
from specforge_core.types import Batch, CaptureSpec, Collate, Draft, Sample


class ShortConfig(DFlashConfig):
    """DFlash's options, and one more."""

    trained_slots: int = Field(
        4, gt=0, le=1024, description="Drafting slots of a block with a loss."
    )


@hookimpl
def specforge_config() -> type[ShortConfig]:
    """Return this variant's options."""
    return ShortConfig


@hookimpl
def specforge_collate(config: ShortConfig, spec: CaptureSpec, draft: Draft) -> Collate:
    """Make DFlash's batches, and leave the later slots out of the loss."""
    whole = specforge_dflash.specforge_collate(config=config, spec=spec, draft=draft)

    def collate(samples: Sequence[Sample]) -> Batch:
        batch = whole(samples)
        valid = batch["valid"].clone()
        valid[..., config.first_slot + config.trained_slots :] = False
        return train_slots(batch, valid)

    return collate
