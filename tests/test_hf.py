from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.target.engine import TransformersEngine, load_target_info
from specforge_core.target.taps import tap_states
from specforge_core.types import CaptureSpec, Prompt

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "Gemma3Text": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "SmolLM3": {},
    "Granite": {"embedding_multiplier": 6.0},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GPT2": {"n_inner": 64},
}
ALL = CaptureSpec((-1, 0, 1, 2, 3, 4), "none", {})


def save(path: Path, family: str) -> TargetConfig:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family]})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return TargetConfig(path=str(path), device="cpu", batch_tokens=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    return save(tmp_path_factory.mktemp("llama"), "Llama")


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (n,), generator=draw) for n in lengths]
    return [Prompt(10 + i, row, (row % 2).long()) for i, row in enumerate(rows)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_are_the_models_own_hidden_states(family: str, tmp_path: Path):
    engine = TransformersEngine.load(save(tmp_path, family))
    asked = prompts(7, 20, 20, 3, 31)
    pre = {c.index: c for c in engine.capture(asked, replace(ALL, final="pre_norm"))}
    post = {c.index: c for c in engine.capture(asked, CaptureSpec((), "post_norm", {}))}
    assert sorted(pre) == sorted(post) == [p.index for p in asked]
    for prompt in asked:
        alone = engine.model(prompt.input_ids[None], output_hidden_states=True).hidden_states
        capture = pre[prompt.index]
        assert torch.equal(capture.input_ids, prompt.input_ids)
        assert torch.equal(capture.loss_mask, prompt.loss_mask)
        for layer in range(-1, 4):
            close(capture.hidden_states[layer], alone[layer + 1][0])
        # transformers keeps only the normed form of the last layer's output
        close(post[prompt.index].final, alone[5][0])
        assert capture.final is capture.hidden_states[4] or torch.equal(
            capture.final, capture.hidden_states[4]
        )
        norm = getattr(engine.model.get_decoder(), "ln_f" if family == "GPT2" else "norm")
        close(norm(capture.final), alone[5][0])
        assert not torch.allclose(capture.final, alone[5][0], atol=1e-2)


@pytest.mark.parametrize(
    ("spec", "ran"),
    [
        (CaptureSpec((-1,), "none", {}), []),
        (CaptureSpec((1, -1), "none", {}), [0, 1]),
        (CaptureSpec((0,), "pre_norm", {}), [0, 1, 2, 3, 4]),
        (CaptureSpec((0,), "post_norm", {}), [0, 1, 2, 3, 4]),
    ],
)
def test_the_forward_stops_after_the_last_layer_needed(
    llama: TargetConfig, spec: CaptureSpec, ran: list[int]
):
    engine = TransformersEngine.load(llama)
    seen: list[int] = []
    for i, layer in enumerate(engine.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    engine.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(99))
    (capture,) = engine.capture(prompts(6), spec)
    assert seen == ran
    assert set(capture.hidden_states) == set(spec.layers)
    assert (capture.final is None) == (spec.final == "none")


def test_taps_leave_the_forward_and_the_model_as_they_were(llama: TargetConfig):
    model = TransformersEngine.load(llama).model
    (prompt,) = prompts(9)
    plain = model(prompt.input_ids[None]).logits
    with tap_states(model, CaptureSpec((2,), "post_norm", {}), stop=False) as taps:
        tapped = model(prompt.input_ids[None]).logits
    assert torch.equal(plain, tapped)
    assert taps.final is not None
    assert taps.hidden_states[2].shape == taps.final.shape == (1, 9, 32)
    close(model.lm_head(taps.final), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_the_block_is_not_swallowed_and_hooks_are_removed(llama: TargetConfig):
    model = TransformersEngine.load(llama).model
    with pytest.raises(ZeroDivisionError), tap_states(model, ALL, stop=True):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_skips_the_layers_is_an_error(llama: TargetConfig):
    model = TransformersEngine.load(llama).model
    with (
        pytest.raises(CaptureError, match=r"did not run the layers asked for: \[1\], final none"),
        tap_states(model, CaptureSpec((1,), "none", {}), stop=True),
    ):
        pass


def test_a_layer_that_the_target_lacks_is_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    with pytest.raises(CaptureError, match=r"layers \[-2, 5\] are not in the target.*0 to 4"):
        list(engine.capture(prompts(4), CaptureSpec((-2, 1, 5), "none", {})))


def test_a_draft_can_train_on_what_was_captured(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    (capture,) = engine.capture(prompts(6), CaptureSpec((2,), "none", {}))
    draft = torch.nn.Linear(32, 4)
    draft(capture.hidden_states[2]).sum().backward()
    assert draft.weight.grad is not None
    assert not capture.hidden_states[2].requires_grad


def test_non_finite_states_name_the_prompt_and_layer(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[42] = float("nan")
    good, bad = (
        Prompt(i, torch.tensor([5, token, 6]), torch.ones(3).long())
        for i, token in ((7, 3), (8, 42))
    )
    assert len(list(engine.capture([good], ALL))) == 1
    with pytest.raises(CaptureError, match="prompt 8: layer 0 is not finite at 3 of 3 tokens"):
        list(engine.capture([good, bad], CaptureSpec((0,), "none", {})))


def test_states_whose_sum_overflows_are_not_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[5] = 3e38
    prompt = Prompt(0, torch.tensor([5, 5]), torch.ones(2).long())
    (capture,) = engine.capture([prompt], CaptureSpec((-1,), "none", {}))
    assert capture.hidden_states[-1].isfinite().all()


def test_token_ids_beyond_the_vocabulary_name_the_prompt(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    wrong = Prompt(4, torch.tensor([5, 97]), torch.ones(2).long())
    with pytest.raises(CaptureError, match=r"prompt 4 has token ids 5 to 97.*is 0 to 96"):
        list(engine.capture([wrong], ALL))


def test_info_reads_no_weights(llama: TargetConfig, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((Path(llama.path) / "config.json").read_bytes())
    info = load_target_info(TargetConfig(path=str(tmp_path)))
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (32, 5, 97)
    assert info.revision is None
    assert info.config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtype_auto_is_the_checkpoints_own(
    llama: TargetConfig, tmp_path: Path, dtype: Any, expected: torch.dtype
):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), dtype=dtype))
    assert engine.model.dtype == expected


def test_a_missing_target_is_a_config_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"target.path 'no/such-model' cannot be loaded: .*Try:"):
        load_target_info(TargetConfig(path="no/such-model"))


def test_a_directory_without_a_model_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json: it is not a saved model"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_an_unknown_architecture_is_a_config_error(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no_such_type"):
        load_target_info(TargetConfig(path=str(tmp_path)))


@pytest.mark.parametrize("config", [transformers.T5Config(), transformers.ViTConfig()])
def test_a_model_that_is_no_causal_decoder_is_a_config_error(config: Any, tmp_path: Path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{config.model_type}.*Choose another target.path"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_a_bidirectional_decoder_is_a_config_error(tmp_path: Path):
    config = transformers.Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="states depend on later tokens"):
        load_target_info(TargetConfig(path=str(tmp_path)))


def test_a_final_norm_that_cannot_be_found_is_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    engine.model.model.closing = engine.model.model.norm
    del engine.model.model.norm
    with pytest.raises(CaptureError, match="no final norm found in LlamaForCausalLM"):
        list(engine.capture(prompts(4), replace(ALL, final="post_norm")))
    assert len(list(engine.capture(prompts(4), ALL))) == 1  # not needed otherwise


def test_layers_that_cannot_be_found_are_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama)
    engine.model.model.stack = engine.model.model.layers
    del engine.model.model.layers
    with pytest.raises(CaptureError, match="the 5 decoder layers of LlamaForCausalLM are not"):
        list(engine.capture(prompts(4), ALL))


def test_a_checkpoint_that_lacks_weights_is_a_config_error(llama: TargetConfig, tmp_path: Path):
    for file in Path(llama.path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of its weights, such as model\.layers\.1\.mlp"):
        TransformersEngine.load(TargetConfig(path=str(tmp_path)))


def test_options_reach_transformers(llama: TargetConfig) -> None:
    eager = llama.model_copy(update={"options": {"attn_implementation": "eager"}})
    assert TransformersEngine.load(eager).model.config._attn_implementation == "eager"
    wrong = llama.model_copy(update={"options": {"attn_implementation": "no_such"}})
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*no_such"):
        TransformersEngine.load(wrong)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_config_error(llama: TargetConfig, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"target\.device '{device}' cannot be used: .*auto"):
        TransformersEngine.load(llama.model_copy(update={"device": device}))
