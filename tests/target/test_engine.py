from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from specforge_core.compiled import compiled
from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError, ConfigError
from specforge_core.target.engine import TransformersEngine
from specforge_core.target.taps import tap_states
from specforge_core.testing.close import close
from specforge_core.types import CaptureSpec, GenerateOptions, Prompt

from .. import families
from .small import CPU, FAMILIES, save

ALL = CaptureSpec(layers=(-1, 0, 1, 2, 3, 4), fields={})


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 97, (n,), generator=draw) for n in lengths]
    return [
        Prompt(index=10 + i, input_ids=row, loss_mask=(row % 2).long())
        for i, row in enumerate(rows)
    ]


TERMS = 5 * 256  # five layers' products, at most 64 wide, and their attention


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_are_the_models_own_hidden_states(family: str, tmp_path: Path):
    engine = TransformersEngine.load(save(tmp_path, family), CPU)
    asked = prompts(7, 20, 20, 3, 31)
    pre = {c.index: c for c in engine.capture(asked, replace(ALL, final="pre_norm"))}
    post = {
        c.index: c
        for c in engine.capture(asked, CaptureSpec(layers=(), final="post_norm", fields={}))
    }
    assert sorted(pre) == sorted(post) == [p.index for p in asked]
    for prompt in asked:
        alone = engine.model(prompt.input_ids[None], output_hidden_states=True).hidden_states
        capture = pre[prompt.index]
        assert torch.equal(capture.input_ids, prompt.input_ids)
        assert torch.equal(capture.loss_mask, prompt.loss_mask)
        for layer in range(-1, 4):
            close(capture.hidden_states[layer], alone[layer + 1][0], terms=TERMS)
        # transformers keeps only the normed form of the last layer's output
        close(post[prompt.index].final, alone[5][0], terms=TERMS)
        assert capture.final is capture.hidden_states[4] or torch.equal(
            capture.final, capture.hidden_states[4]
        )
        norm = getattr(engine.model.get_decoder(), "ln_f" if family == "GPT2" else "norm")
        close(norm(capture.final), alone[5][0], terms=TERMS)
        # a norm changes a state much more than rounding does
        assert not torch.allclose(capture.final, alone[5][0], atol=1e-2)


@pytest.mark.parametrize(
    ("spec", "ran"),
    [
        (CaptureSpec(layers=(-1,), fields={}), []),
        (CaptureSpec(layers=(1, -1), fields={}), [0, 1]),
        (CaptureSpec(layers=(0,), final="pre_norm", fields={}), [0, 1, 2, 3, 4]),
        (CaptureSpec(layers=(0,), final="post_norm", fields={}), [0, 1, 2, 3, 4]),
    ],
)
def test_the_forward_stops_after_the_last_layer_needed(
    llama: TargetConfig, spec: CaptureSpec, ran: list[int]
):
    engine = TransformersEngine.load(llama, CPU)
    seen: list[int] = []
    for i, layer in enumerate(engine.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    engine.model.lm_head.register_forward_pre_hook(lambda *_: seen.append(99))
    (capture,) = engine.capture(prompts(6), spec)
    assert seen == ran
    assert set(capture.hidden_states) == set(spec.layers)
    assert (capture.final is None) == (spec.final == "none")


def hooks(model: torch.nn.Module) -> int:
    # transformers leaves some of its own where hidden states were asked for
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_taps_leave_the_forward_and_the_model_as_they_were(llama: TargetConfig):
    model = TransformersEngine.load(llama, CPU).model
    before = hooks(model)
    (prompt,) = prompts(9)
    plain = model(prompt.input_ids[None]).logits
    with tap_states(
        model, CaptureSpec(layers=(2,), final="post_norm", fields={}), stop=False
    ) as taps:
        tapped = model(prompt.input_ids[None]).logits
    assert torch.equal(plain, tapped)
    assert taps.final is not None
    assert taps.hidden_states[2].shape == taps.final.shape == (1, 9, 32)
    close(model.lm_head(taps.final), plain, terms=TERMS)
    assert hooks(model) == before


def test_an_error_inside_the_block_is_not_swallowed_and_hooks_are_removed(llama: TargetConfig):
    model = TransformersEngine.load(llama, CPU).model
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), tap_states(model, ALL, stop=True):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_a_forward_that_skips_the_layers_is_an_error(llama: TargetConfig):
    model = TransformersEngine.load(llama, CPU).model
    with (
        pytest.raises(CaptureError, match=r"did not run the layers asked for: \[1\], final none"),
        tap_states(model, CaptureSpec(layers=(1,), fields={}), stop=True),
    ):
        pass


def test_a_layer_that_the_target_lacks_is_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    with pytest.raises(CaptureError, match=r"layers \[-2, 5\] are not in the target.*0 to 4"):
        list(engine.capture(prompts(4), CaptureSpec(layers=(-2, 1, 5), fields={})))


def test_a_draft_can_train_on_what_was_captured(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    (capture,) = engine.capture(prompts(6), CaptureSpec(layers=(2,), fields={}))
    draft = torch.nn.Linear(32, 4)
    draft(capture.hidden_states[2]).sum().backward()
    assert draft.weight.grad is not None
    assert not capture.hidden_states[2].requires_grad


def test_non_finite_states_name_the_prompt_and_layer(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[42] = float("nan")
    good, bad = (
        Prompt(index=i, input_ids=torch.tensor([5, token, 6]), loss_mask=torch.ones(3).long())
        for i, token in ((7, 3), (8, 42))
    )
    assert len(list(engine.capture([good], ALL))) == 1
    where = "prompt 8: layer 0 is not finite at 3 of 3 tokens"
    advice = r"\(torch.float32\)\. No dtype is wider: .* Try another target\.revision"
    with pytest.raises(CaptureError, match=f"{where} {advice}"):
        list(engine.capture([good, bad], CaptureSpec(layers=(0,), fields={})))


def test_states_whose_sum_overflows_are_not_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[5] = 3e38
    prompt = Prompt(index=0, input_ids=torch.tensor([5, 5]), loss_mask=torch.ones(2).long())
    (capture,) = engine.capture([prompt], CaptureSpec(layers=(-1,), fields={}))
    assert capture.hidden_states[-1].isfinite().all()


def test_token_ids_beyond_the_vocabulary_name_the_prompt(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    wrong = Prompt(index=4, input_ids=torch.tensor([5, 97]), loss_mask=torch.ones(2).long())
    with pytest.raises(CaptureError, match=r"prompt 4 has token ids 5 to 97.*is 0 to 96"):
        list(engine.capture([wrong], ALL))


def test_parts_are_found_whatever_they_are_called(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    (expected,) = engine.capture(prompts(4), replace(ALL, final="post_norm"))
    decoder = engine.model.model
    for name in ("layers", "norm"):  # the decoder's forward finds them by other ways
        module = getattr(decoder, name)
        delattr(decoder, name)
        setattr(decoder, f"renamed_{name}", module)
    decoder.__class__ = type("Renamed", (type(decoder),), {"layers": property(_layers)})
    decoder.__class__.norm = property(lambda self: self.renamed_norm)
    (found,) = engine.capture(prompts(4), replace(ALL, final="post_norm"))
    assert torch.equal(found.final, expected.final)
    assert all(torch.equal(found.hidden_states[i], expected.hidden_states[i]) for i in ALL.layers)


def _layers(decoder: Any) -> Any:
    return decoder.renamed_layers


def test_of_a_model_of_images_its_whole_language_model_is_run(tmp_path: Path):
    families.save("llama4_mm", tmp_path)
    engine = TransformersEngine.load(TargetConfig(path=str(tmp_path), dtype="float32"), CPU)
    assert type(engine.model).__name__ == "Llama4ForCausalLM"
    assert engine.model.generation_config.eos_token_id == engine.info.config["eos_token_id"]


def test_layers_that_cannot_be_found_are_an_error(llama: TargetConfig):
    engine = TransformersEngine.load(llama, CPU)
    engine.model.model.stack = torch.nn.Sequential(*engine.model.model.layers)
    del engine.model.model.layers
    with pytest.raises(CaptureError, match="LlamaForCausalLM has no list of layers beside its inp"):
        list(engine.capture(prompts(4), ALL))


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(
    ("family", "lengths"),  # whose ropes are others from 257 and from 513 tokens on
    [("phi3_longrope", (250, 260, 100, 300)), ("llama_dynamic", (500, 700, 100, 600))],
)
def test_a_rope_turns_no_shorter_sequence_by_a_longer_ones_angles(
    family: str, lengths: tuple[int, ...], packs: bool, tmp_path: Path
):
    families.save(family, tmp_path)
    target = TargetConfig(path=str(tmp_path), dtype="float32", batch_tokens=4096)
    loaded = TransformersEngine.load(target, CPU)
    engine = TransformersEngine(
        loaded.model, loaded.info, loaded._head, 4096, padded="" if packs else "so asked"
    )
    engine._least = 4096  # as a GPU's, for which all of these are one batch
    asked = prompts(*lengths)
    found = {c.index: c for c in engine.capture(asked, CaptureSpec(layers=(2,), fields={}))}
    for prompt in sorted(asked, key=lambda prompt: len(prompt.input_ids)):
        alone = engine.model(prompt.input_ids[None], output_hidden_states=True).hidden_states
        close(found[prompt.index].hidden_states[2], alone[3][0], terms=TERMS)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_layers_are_compiled_once_for_captures_and_not_for_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = TransformersEngine.load(save(tmp_path, family), CPU)
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr("specforge_core.target.engine.compiled", partial(compiled, backend=counter))
    engine = TransformersEngine(plain.model, plain.info, plain._head, 64, compile=True)
    spec = replace(ALL, final="post_norm", next_tokens=True)
    for lengths in ((7, 20, 20, 3), (5, 9), (31, 31), (12, 3)):
        found = {c.index: c for c in engine.capture(prompts(*lengths), spec)}
        for expected in plain.capture(prompts(*lengths), spec):
            capture = found[expected.index]
            assert expected.final is not None
            assert capture.final is not None
            close(capture.final, expected.final, terms=TERMS)
            assert capture.hidden_states.keys() == expected.hidden_states.keys()
    assert 1 <= counter.frame_count <= 2  # a batch of one row is a graph of its own
    before = counter.frame_count
    assert engine.model(prompts(5)[0].input_ids[None], output_hidden_states=True).hidden_states
    options = GenerateOptions(max_new_tokens=4)
    list(engine.generate(prompts(5, 6), options))
    assert counter.frame_count == before


def test_who_captures_nothing_waits_for_no_proof_of_packing(
    llama: TargetConfig, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    monkeypatch.setattr("specforge_core.target.engine.PACKING", {"cpu"})
    monkeypatch.setattr(
        "specforge_core.target.engine.why_padded", lambda *_: asked.append(1) or "so found"
    )
    engine = TransformersEngine.load(llama, CPU)
    list(engine.generate(prompts(5), GenerateOptions(max_new_tokens=2)))
    assert asked == []
    for _ in range(2):
        list(engine.capture(prompts(5, 9), ALL))
    assert asked == [1]


@pytest.mark.parametrize("value", [True, "yes", 2])
def test_a_target_on_a_cpu_is_not_compiled(llama: TargetConfig, value: object):
    asked = llama.model_copy(update={"options": {"compile": value}})
    with pytest.raises(ConfigError, match=rf"target.options.compile is {value!r}: .*on cpu. Try"):
        TransformersEngine.load(asked, CPU)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")
def test_a_compiled_capture_is_the_capture(tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    target, gpu = save(tmp_path, "Qwen3"), torch.device("cuda")
    plain = TransformersEngine.load(target, gpu)
    asked = target.model_copy(update={"options": {"compile": True}})
    engine = TransformersEngine.load(asked, gpu)
    spec = replace(ALL, final="post_norm", logsumexp=True)
    for lengths in ((7, 20, 20, 3), (5, 9), (31, 31)):
        found = {c.index: c for c in engine.capture(prompts(*lengths), spec)}
        for expected in plain.capture(prompts(*lengths), spec):
            capture = found[expected.index]
            close(capture.final, expected.final, terms=TERMS)
            close(capture.logsumexp, expected.logsumexp, terms=TERMS)
