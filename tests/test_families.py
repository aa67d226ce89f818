"""Every family that transformers can build goes the whole way, or is refused for a true reason.

Captured, compared with the model's own states, trained, evaluated losslessly, exported and read
back.  Here a sample of the families; all of them with SPECFORGE_ALL_FAMILIES=1.  Each chain is a
test of its own and needs no other, so that they can run in as many processes as there are cores.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, SpecForgeError
from specforge_core.target.head import head_scale
from specforge_core.target.info import load_target_info

from . import families
from .chain import STRATEGIES, whole_chain

SAMPLE = ("gemma4_text", "gpt2", "granite", "lfm2", "llava", "longcat_flash", "phi", "qwen3_next")
ALL = bool(os.environ.get("SPECFORGE_ALL_FAMILIES"))
OUT = os.environ.get("SPECFORGE_FAMILIES_OUT")  # a file that gets a line of JSON for each chain
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


def tell(**values: object) -> None:
    """Add a line to the file that all processes write, also where the run is broken off later."""
    if OUT is not None:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        with Path(OUT).open("ab", buffering=0) as file:  # one write: lines stay whole
            file.write(json.dumps({**values, **versions}).encode() + b"\n")


def test_at_least_105_families_are_right() -> None:
    assert len(families.NAMES) - len(REFUSED) - len(NEEDS) >= 105


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers' own code, family by family
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", families.NAMES if ALL else SAMPLE)
def test_a_family_goes_the_whole_way(
    family: str, strategy: str, tmp_path: Path, table: list[str]
) -> None:
    started = time.perf_counter()
    result, why = "failed", ""
    try:
        result, why = outcome(family, strategy, tmp_path)
    except SpecForgeError as exc:
        why = str(exc)
        pytest.fail(f"{family}, {strategy}: {exc}")
    except BaseException as exc:
        why = f"{type(exc).__name__}: {exc}"
        raise
    finally:
        table.append(f"{family:18} {strategy:7} {result} {why}")
        seconds = round(time.perf_counter() - started, 1)
        tell(family=family, strategy=strategy, result=result, why=why[:2000], seconds=seconds)


def outcome(family: str, strategy: str, folder: Path) -> tuple[str, str]:
    """Return right (and what formats refused it), refused or needs; raises where it is wrong."""
    if family in NEEDS:
        with pytest.raises(ImportError, match=NEEDS[family]):
            families.build(family)
        return "needs", NEEDS[family]
    families.save(family, folder / "target")
    model = families.build(family)
    if family in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[family]) as refused:
            whole_chain(strategy, folder / "target", folder / "run", model)
        return "refused", str(refused.value)
    return "right", whole_chain(strategy, folder / "target", folder / "run", model)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = 0.5 * output.logits
        return output
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers' own code
def test_a_target_that_brings_its_own_code_goes_the_whole_way(tmp_path: Path) -> None:
    target = tmp_path / "target"
    families.save("llama", target)
    (target / "own.py").write_text(OWN_CODE)
    said = json.loads((target / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    said |= {"model_type": "own_llama", "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    (target / "config.json").write_text(json.dumps(said))
    model = families.build("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: 0.5 * logits)
    with pytest.raises(SpecForgeError, match=r"Try: target\.trust_remote_code=true"):
        whole_chain("eagle3", target, tmp_path / "untrusted", model)
    trusted = "target.trust_remote_code=true"
    whole_chain("eagle3", target, tmp_path / "run", model, trusted)
    info = load_target_info(TargetConfig(path=str(target), trust_remote_code=True))
    assert head_scale(info).scale == 0.5
