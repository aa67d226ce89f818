"""What the engine makes of the target's head is what the model itself makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.head import Head
from specforge_core.target.info import load_target_info
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, Prompt, TargetInfo

from .small import SHAPE

# each with a head that is more than a matrix
HEADS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {"partial_rotary_factor": 0.5},  # a bias
}
SPEC = CaptureSpec(layers=(), final="post_norm", fields={}, next_tokens=True, logsumexp=True)
DTYPES = [torch.float64, torch.float32]


def build(path: Path, family: str, dtype: torch.dtype) -> tuple[Any, TargetInfo]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **HEADS[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(path)
    return model, load_target_info(TargetConfig(path=str(path)))


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (n,), generator=draw) for n in lengths]
    return [Prompt(index=i, input_ids=row, loss_mask=row % 2) for i, row in enumerate(rows)]


def summary(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.argmax(-1), logits.double().logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HEADS)
def test_next_tokens_and_logsumexp_are_those_of_the_models_logits(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, info = build(tmp_path, family, dtype)
    engine = TransformersEngine(model, info, Head.of_model(model, info), 64)
    asked = prompts(7, 20, 3)
    captures = {c.index: c for c in engine.capture(asked, SPEC)}
    for prompt in asked:
        with torch.no_grad():
            logits = model(prompt.input_ids[None]).logits[0]
        capture = captures[prompt.index]
        assert capture.final is not None
        assert capture.next_tokens is not None
        assert capture.logsumexp is not None
        assert (capture.next_tokens.dtype, capture.logsumexp.dtype) == (torch.int64, torch.float32)
        assert capture.next_tokens.device.type == capture.logsumexp.device.type == "cpu"
        tokens, sums = summary(logits)
        assert torch.equal(capture.next_tokens, tokens)
        torch.testing.assert_close(capture.logsumexp, sums.float(), rtol=1e-5, atol=1e-5)
        exact = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
        (alone,) = engine.capture([prompt], SPEC)  # another batch rounds in float32 inside
        assert alone.final is not None
        found = Head.of_model(model, info).logits(alone.final)
        torch.testing.assert_close(found, logits, **exact)


@pytest.mark.parametrize("family", HEADS)
def test_the_head_read_from_files_is_the_loaded_models(family: str, tmp_path: Path) -> None:
    model, info = build(tmp_path, family, torch.float32)
    read, loaded = Head.load(info), Head.of_model(model, info)
    assert torch.equal(read.weight, loaded.weight)
    assert (read.scale, read.softcap) == (loaded.scale, loaded.softcap)
    assert (read.bias is None) == (loaded.bias is None) == (family != "Phi")
    state = torch.randn(2, 5, 32)
    assert torch.equal(read.logits(state), loaded.logits(state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_only_pad_the_vocabulary_are_never_the_next_token(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, info = build(tmp_path, "Llama", dtype)
    info = replace(info, vocab_size=90)
    with torch.no_grad():
        model.lm_head.weight[90:] *= 50  # the largest logits of all
    engine = TransformersEngine(model, info, Head.of_model(model, info), 64)
    (prompt,) = prompts(20)
    prompt = replace(prompt, input_ids=prompt.input_ids % 90)
    (capture,) = engine.capture([prompt], SPEC)
    with torch.no_grad():
        logits = model(prompt.input_ids[None]).logits[0]
    assert (logits.argmax(-1) >= 90).any()
    assert capture.next_tokens is not None
    assert capture.logsumexp is not None
    tokens, sums = summary(logits[:, :90])
    assert torch.equal(capture.next_tokens, tokens)
    torch.testing.assert_close(capture.logsumexp, sums.float(), rtol=1e-5, atol=1e-5)


def test_long_sequences_are_summarized_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)  # two logits of 1,300 rows may be as near as rounding
    head = Head(weight=torch.randn(11, 8), bias=torch.randn(11), scale=0.5, softcap=3.0)
    states = torch.randn(1300, 8)
    tokens, sums = head.summarize(states)
    z = 0.5 * (states @ head.weight.T + head.bias)
    whole = 3.0 * torch.tanh(z / 3.0)
    assert torch.equal(tokens, whole.argmax(-1))
    torch.testing.assert_close(sums, whole.logsumexp(-1))


def test_narrow_logits_are_summed_wide() -> None:
    torch.manual_seed(0)
    head = Head(weight=torch.randn(3000, 8).bfloat16())
    states = torch.randn(700, 8).bfloat16()
    tokens, sums = head.summarize(states)
    logits = F.linear(states, head.weight).double()  # as narrow as the target gives them
    assert sums.dtype == torch.float32
    assert torch.equal(tokens, logits.argmax(-1))  # the first of those that bfloat16 makes equal
    close(sums, logits.logsumexp(-1), terms=3000)


def test_narrow_weights_give_wide_logits() -> None:
    head = Head(weight=torch.randn(11, 8).bfloat16())
    assert head.logits(torch.randn(3, 8)).dtype == torch.float32


def test_what_is_not_asked_for_is_not_given(tmp_path: Path) -> None:
    model, info = build(tmp_path, "Llama", torch.float32)
    engine = TransformersEngine(model, info, Head.of_model(model, info), 64)
    tokens_only = CaptureSpec(layers=(1,), fields={}, next_tokens=True)
    (capture,) = engine.capture(prompts(5), tokens_only)
    assert capture.next_tokens is not None
    assert capture.logsumexp is capture.final is None
    assert set(capture.hidden_states) == {1}
    (capture,) = engine.capture(prompts(5), CaptureSpec(layers=(1,), fields={}))
    assert capture.next_tokens is capture.logsumexp is None


def test_a_model_without_a_head_is_an_error(tmp_path: Path) -> None:
    model, info = build(tmp_path, "Llama", torch.float32)
    with pytest.raises(CaptureError, match="LlamaModel has no language model head"):
        Head.of_model(model.model, info)
