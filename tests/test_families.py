"""Every family that transformers can build goes the whole way, or is refused for a true reason.

Captured, compared with the model's own states, trained, evaluated losslessly, exported and read
back.  Here a sample of the families; all of them with SPECFORGE_ALL_FAMILIES=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge_core.errors import CaptureError, SpecForgeError

from . import families
from .chain import STRATEGIES, whole_chain

SAMPLE = ("gemma4_text", "gpt2", "granite", "lfm2", "llava", "longcat_flash", "phi", "qwen3_next")
ALL = bool(os.environ.get("SPECFORGE_ALL_FAMILIES"))
# what cannot be trained for: four states side by side per layer, of which no engine gives one
REFUSED = {"gemma3n_text": "a decoder layer put out"}
# what transformers builds only with a package that this project does not need
NEEDS = {"gemma3n": "timm"}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Collect one line per chain, and print them at the end (pytest -s shows it)."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))


def test_at_least_105_families_are_right() -> None:
    assert len(families.NAMES) - len(REFUSED) - len(NEEDS) >= 105


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers' own code, family by family
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", families.NAMES if ALL else SAMPLE)
def test_a_family_goes_the_whole_way(
    family: str, strategy: str, tmp_path: Path, table: list[str]
) -> None:
    if family in NEEDS:
        with pytest.raises(ImportError, match=NEEDS[family]):
            families.build(family)
        table.append(f"{family:18} {strategy:7} needs {NEEDS[family]}")
        return
    families.save(family, tmp_path / "target")
    model = families.build(family)
    if family in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[family]) as refused:
            whole_chain(strategy, tmp_path / "target", tmp_path / "run", model)
        table.append(f"{family:18} {strategy:7} {refused.value}")
        return
    try:
        formats = whole_chain(strategy, tmp_path / "target", tmp_path / "run", model)
    except SpecForgeError as exc:
        pytest.fail(f"{family}, {strategy}: {exc}")
    table.append(f"{family:18} {strategy:7} right {formats}")
