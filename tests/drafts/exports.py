"""A small export, and what is compared of two."""

from __future__ import annotations

from pathlib import Path

import torch

from specforge_core.types import Export


def export(seed: int = 0) -> Export:
    torch.manual_seed(seed)
    weights = {
        "a.weight": torch.randn(8, 4),
        "b.weight": torch.randn(16, 4).bfloat16(),
        "c.index": torch.arange(5),
    }
    return Export(config={"model_type": "tiny", "layers": [1, 2], "name": "ü"}, weights=weights)


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def same(left: Export, right: Export) -> None:
    assert dict(left.config) == dict(right.config)
    assert left.weights.keys() == right.weights.keys()
    for name, tensor in left.weights.items():
        assert tensor.dtype == right.weights[name].dtype
        assert torch.equal(tensor, right.weights[name])
