"""Sequences packed into one row are captured as each of them alone, or the target stays padded."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.testing import CompileCounter
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from specforge_core.cli import cli
from specforge_core.compiled import compiled
from specforge_core.config import TargetConfig
from specforge_core.target import engine as engine_module, varlen
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.varlen_proof import FAR, why_padded, window_of
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, GenerateOptions, Prompt

from .. import families
from .small import CPU, FAMILIES, save

ALL = CaptureSpec(
    layers=(-1, 0, 1, 2, 3, 4), final="post_norm", next_tokens=True, logsumexp=True, fields={}
)
WHOLE_ROW = "a sequence at the end of a long row differs by"
TERMS = 5 * 256  # five layers' products, at most 64 wide, and their attention


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (n,), generator=draw) for n in lengths]
    ones = torch.ones_like
    return [Prompt(index=i, input_ids=row, loss_mask=ones(row)) for i, row in enumerate(rows)]


def packing(engine: TransformersEngine, **options: Any) -> TransformersEngine:
    budget = engine._batch_tokens
    return TransformersEngine(engine.model, engine.info, engine._head, budget, padded="", **options)


def same(
    packs: TransformersEngine, pads: TransformersEngine, *lengths: int, spec: CaptureSpec = ALL
) -> None:
    asked = prompts(*lengths)
    expected = {capture.index: capture for capture in pads.capture(asked, spec)}
    found = {capture.index: capture for capture in packs.capture(asked, spec)}
    assert found.keys() == expected.keys()
    for index, capture in found.items():
        given = expected[index]
        for layer in spec.layers:
            close(capture.hidden_states[layer], given.hidden_states[layer], terms=TERMS)
        close(capture.final, given.final, terms=TERMS)
        assert given.final is not None
        close(capture.logsumexp, given.logsumexp, terms=TERMS, dtype=given.final.dtype)
        assert torch.equal(capture.input_ids, given.input_ids)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma2"])
def test_packed_captures_are_those_of_padded_rows(family: str, tmp_path: Path):
    pads = TransformersEngine.load(save(tmp_path, family), CPU)
    assert not pads._packed  # a CPU has no kernel for it
    assert why_padded(pads.model, pads.info, pads._batch_tokens) == ""
    passes = []
    pads._decoder.register_forward_pre_hook(
        lambda _, __, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    same(packing(pads), pads, 7, 20, 20, 3, 31, 1, 70)
    assert passes[-3:] == [(1, 70), (1, 51), (1, 31)]  # with not one token of padding


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen2_5_vl"])
def test_sinks_narrow_values_and_positions_of_images_are_packed(family: str, tmp_path: Path):
    families.save(family, tmp_path)
    pads = TransformersEngine.load(TargetConfig(path=str(tmp_path), dtype="float32"), CPU)
    assert why_padded(pads.model, pads.info, pads._batch_tokens) == ""
    layers = tuple(range(-1, pads.info.num_layers))
    same(packing(pads), pads, 7, 20, 3, 31, 1, spec=replace(ALL, layers=layers))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "layer 0 has no attention that transformers looks up"),  # alibi
        ("deepseek_v32", "an attention is given indices"),
        ("falcon_h1", "sequence 1 of a row differs by"),  # attention and a recurrence side by side
        ("gemma2", "an attention is given softcap"),
        ("lfm2", "layer 0 has no attention that transformers looks up"),
        ("llama4_text", "its masks are neither causal nor sliding windows"),
        ("mamba2", "layer 0 has no attention that transformers looks up"),
        ("phi3_longrope", "sequence 0 of a row changes by"),  # with the last position of another
        ("qwen3_next", "layer 0 has no attention that transformers looks up"),
    ],
)
def test_what_is_not_proved_stays_padded(
    family: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    families.save(family, tmp_path)
    monkeypatch.setattr(engine_module, "PACKING", {"cpu"})
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), dtype="float32"), CPU)
    assert not engine._packed
    assert engine.why_padded.startswith(reason)


def test_where_there_is_a_kernel_it_is_used_unless_an_attention_was_asked_for(
    llama: TargetConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_module, "PACKING", {"cpu"})
    assert TransformersEngine.load(llama, CPU)._packed
    asked = llama.model_copy(update={"options": {"attn_implementation": "sdpa"}})
    assert not TransformersEngine.load(asked, CPU)._packed


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", "captures: packed, without padding"),
        ("gemma2", "captures: padded, since an attention is given softcap"),
    ],
)
def test_check_says_whether_captures_are_packed(
    family: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    families.save(family, tmp_path)
    arguments = ["check", "linear", f"target.path={tmp_path}", "target.dtype=float32"]
    on_cpu = CliRunner().invoke(cli, [*arguments, "target.device=cpu"], catch_exceptions=False)
    assert "captures: padded, since a cpu has no kernel for packed sequences" in on_cpu.output
    monkeypatch.setattr(engine_module, "PACKING", {"cpu"})
    done = CliRunner().invoke(cli, [*arguments, "target.device=cpu"], catch_exceptions=False)
    assert said in done.output


def test_a_target_that_was_proved_and_closed_leaves_no_memory_behind(
    llama: TargetConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_module, "PACKING", {"cpu"})
    engine = TransformersEngine.load(llama, CPU)
    assert len(list(engine.capture(prompts(5, 9), ALL))) == 2
    weights = weakref.ref(engine.model.model.layers[1].self_attn.q_proj.weight)
    engine.close()
    gc.collect()
    assert weights() is None


def mix(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
    return states + 0.5 * states.roll(1, dims=1)  # a convolution's: of the token before


def test_a_layer_that_looks_at_the_token_before_stays_padded(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    engine.model.model.layers[2].register_forward_hook(mix)
    assert why_padded(engine.model, engine.info, engine._batch_tokens).startswith(
        "sequence 0 of a row differs by"
    )


def test_a_layer_whose_window_is_not_its_masks_stays_padded(tmp_path: Path):
    engine = TransformersEngine.load(save(tmp_path, "Gemma3Text"), CPU)
    layer = engine.model.model.layers[0].self_attn
    assert layer.sliding_window == 4
    for window in (None, 5):
        layer.sliding_window = window
        why = why_padded(engine.model, engine.info, engine._batch_tokens)
        assert why == f"a layer names a window of {window} where its mask has 4 (0: all)"


def test_a_window_that_only_long_sequences_get_stays_padded(
    llama: TargetConfig, monkeypatch: pytest.MonkeyPatch
):
    def masks(**asked: Any) -> Any:
        if asked["inputs_embeds"].shape[1] > 60:
            asked["and_mask_function"] = masking_utils.sliding_window_overlay(60)
        return masking_utils.create_causal_mask(**asked)

    engine = TransformersEngine.load(llama, CPU)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", masks)
    why = why_padded(engine.model, engine.info, 128)
    assert why == "a layer names a window of None where its mask has 60 (0: all)"


@pytest.mark.parametrize(("batch_tokens", "why"), [(200, ""), (2000, WHOLE_ROW)])
def test_places_counted_from_the_begin_of_a_row_stay_padded(
    batch_tokens: int, why: str, llama: TargetConfig
):
    def scale(_: Any, __: Any, query: torch.Tensor) -> torch.Tensor:  # as llama4's temperature
        places = torch.arange(query.shape[1])
        return query * (1 + (places // 600).log1p())[:, None]

    engine = TransformersEngine.load(llama, CPU)
    engine.model.model.layers[2].self_attn.q_proj.register_forward_hook(scale)
    assert why_padded(engine.model, engine.info, batch_tokens)[: len(WHOLE_ROW)] == why


def test_an_attention_that_sees_later_tokens_stays_padded(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    engine.model.model.layers[1].self_attn.is_causal = False
    assert (
        why_padded(engine.model, engine.info, engine._batch_tokens) == "an attention is not causal"
    )


def test_the_window_of_a_mask_is_found_however_long_it_is():
    assert window_of(masking_utils.causal_mask_function) == 0
    for window in (1, 2, 128, 4096, FAR - 1):
        assert window_of(masking_utils.sliding_window_causal_mask_function(window)) == window
    chunks = masking_utils.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long))
    ends = masking_utils.sliding_window_bidirectional_mask_function(64)
    for other in (chunks, ends, masking_utils.bidirectional_mask_function):
        with pytest.raises(Exception, match="neither causal nor sliding windows"):
            window_of(other)
    images = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    with pytest.raises(IndexError):  # it knows the places of one batch alone
        window_of(masking_utils.or_masks(masking_utils.causal_mask_function, images))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_rows_of_any_lengths_share_a_graph(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pads = TransformersEngine.load(save(tmp_path, family), CPU)
    before = pads.model.config._attn_implementation
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(engine_module, "compiled", partial(compiled, backend=counter))
    packs = packing(pads, compile=True)
    for lengths in ((7, 20, 20, 3), (5, 9), (31, 31), (12,), (2, 3, 60), (9, 1)):
        same(packs, pads, *lengths)
    kinds = 2 if family == "Gemma3Text" else 1  # of layers: with a window and without
    assert counter.frame_count == kinds
    assert pads.model.config._attn_implementation == before
    list(packs.generate(prompts(5, 6), GenerateOptions(max_new_tokens=4)))
    assert counter.frame_count == kinds


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lengths", [[3, 200, 1, 129, 64], [130, 130]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("window", "sinks", "narrower"), [(0, False, 0), (200, False, 0), (5, True, 0), (0, True, 8)]
)
def test_a_row_gives_what_each_sequence_gives_alone(
    window: int, sinks: bool, narrower: int, dtype: torch.dtype, lengths: list[int], device: str
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, width, generator=draw).to(dtype)
        for heads, width in ((4, 32), (2, 32), (2, 32 - narrower))
    )
    logits = torch.randn(4, generator=draw) if sinks else None
    found = packed_rows(lengths, [x.to(device) for x in (q, k, v)], logits, window)
    wide = [
        varlen._one(*x, logits, 0.2, window)
        for x in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    ]
    close(found.cpu(), torch.cat(wide), terms=200)


def packed_rows(
    lengths: list[int], rows: list[torch.Tensor], sinks: torch.Tensor | None, window: int
) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(rows[0].device, torch.int32)
    token = varlen._ROW.set(varlen._Row(ends=ends, lengths=lengths))
    sinks = None if sinks is None else sinks.to(rows[0])
    try:
        found: torch.Tensor = varlen._attention(*rows, sinks, 0.2, window)
        return found
    finally:
        varlen._ROW.reset(token)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text"])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_gpu_packs(family: str, compiles: bool, tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gpu = torch.device("cuda")
    target = save(tmp_path, family).model_copy(update={"dtype": "float16"})
    asked = target.model_copy(update={"options": {"compile": compiles}})
    packs = TransformersEngine.load(asked, gpu)
    assert why_padded(packs.model, packs.info, packs._batch_tokens) == ""
    assert packs._packed
    padded = target.model_copy(update={"options": {"attn_implementation": "sdpa"}})
    pads = TransformersEngine.load(padded, gpu)
    assert not pads._packed
    for lengths in ((7, 20, 20, 3), (5, 9), (120, 31, 1)):
        same(packs, pads, *lengths)
