"""What a published checkpoint leaves out is as engines take it."""

from __future__ import annotations

from typing import Any

import pytest
from specforge_eagle3.export import specforge_export
from specforge_eagle3.importer import specforge_import

from specforge_core.errors import CheckpointError
from specforge_core.types import Export


@pytest.mark.parametrize("layers", [None, [0, 2, 5]])
def test_a_checkpoint_that_names_no_layers_reads_the_published_ones(
    kit: Any, layers: list[int] | None
) -> None:
    """1, n / 2 - 1 and n - 4; nothing else in it would tell."""
    tiny = kit.tiny(layers=layers)
    made = specforge_export(tiny.config, tiny.draft, tiny.target, "hf")
    assert made is not None
    named = ("eagle_config", "eagle_aux_hidden_state_layer_ids")
    config = {name: value for name, value in made.config.items() if name not in named}
    nameless = Export(config=config, weights=made.weights)
    if layers is None:
        assert specforge_import(tiny.draft, nameless)
        return
    with pytest.raises(CheckpointError, match=r"layers \[1, 3, 4\], this run \[0, 2, 5\]"):
        specforge_import(tiny.draft, nameless)
