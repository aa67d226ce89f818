"""A target whose parts are not what they seem is refused by what differs, before it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import head_scale
from specforge_core.target.info import load_target_info
from specforge_core.target.measure import measure_head
from specforge_core.target.proof import prove
from specforge_core.target.skeleton import skeleton

from ..families import build, save

CPU = torch.device("cpu")


def info_of(path: Path) -> Any:
    return load_target_info(TargetConfig(path=str(path)))


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [
        ("llama", 1.0, None),
        ("granite", 1 / 8, None),
        ("cohere", 1 / 16, None),
        ("falcon_h1", 0.5, None),
        ("minicpm3", 0.5, None),  # of the states, not of the logits
        ("gemma2", 1.0, 30.0),
        ("nanochat", 1.0, 15.0),
        ("recurrent_gemma", 1.0, 30.0),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured(
    family: str, scale: float, softcap: float | None, tmp_path: Path
) -> None:
    save(family, tmp_path)
    info = info_of(tmp_path)
    found = measure_head(skeleton(info), info.hidden_size)
    assert found == head_scale(info)
    assert found is not None
    assert (found.scale, found.softcap) == (scale, softcap)


def test_one_spelling_that_means_opposite_things_in_two_families(tmp_path: Path) -> None:
    for family, scale in (("granite", 1 / 8), ("hyperclovax", 8.0)):
        config = build(family).config
        config.logits_scaling = 8.0
        config.save_pretrained(tmp_path / family)
        assert head_scale(info_of(tmp_path / family)).scale == scale


def test_a_layer_that_is_not_what_the_model_lists_is_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, info = build("llama"), info_of(tmp_path)
    prove(model, info)
    assert not any(module._forward_hooks for module in model.modules())  # none that it left there
    model(torch.tensor([[3]]), output_hidden_states=True)  # which takes the states from here on
    model.model.layers[2].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(CaptureError, match=r"layer 2 as captured differs by 50\.00% from what"):
        prove(model, info)


def test_states_that_a_later_token_changes_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = build("llama")

    def mix(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
        return states + states.mean(dim=1, keepdim=True)

    model.model.layers[2].register_forward_hook(mix)
    with pytest.raises(CaptureError, match=r"change by .*% with a token that stands behind them"):
        prove(model, info_of(tmp_path))


def test_embeddings_scaled_by_what_no_config_says_are_refused(tmp_path: Path) -> None:
    for family in ("llama", "gemma2", "granite"):
        save(family, tmp_path / family)
        model, info = build(family), info_of(tmp_path / family)
        prove(model, info)
        model.get_input_embeddings().register_forward_hook(lambda *a: a[2] * 1.5)
        with pytest.raises(CaptureError, match="multiplies its embeddings by "):
            prove(model, info)


def test_a_head_that_does_more_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, info = build("llama"), info_of(tmp_path)
    model.lm_head.register_forward_hook(lambda module, args, output: output.abs())
    with pytest.raises(CaptureError, match=r"logits of LlamaForCausalLM differ by [\d.]+% from"):
        prove(model, info)


def test_the_proof_runs_where_a_target_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("phi", tmp_path)
    target = TargetConfig(path=str(tmp_path), device="cpu", dtype="float32")
    TransformersEngine.load(target, CPU).close()
    from specforge_core.target.head import Head

    whole = Head.of_model
    monkeypatch.setattr(
        Head,
        "of_model",
        classmethod(lambda cls, model, info: Head(weight=whole(model, info).weight)),
    )
    with pytest.raises(CaptureError, match=r"logits of PhiForCausalLM differ by"):
        TransformersEngine.load(target, CPU)
