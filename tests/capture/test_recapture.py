from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.capture import recapture
from specforge_core.capture.recapture import Fresh, compare
from specforge_core.config import TargetConfig
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.toy import save_toy_target
from specforge_core.types import CaptureSpec, Prompt, Sample, TargetCapture

LAYERS = (0, 2, 4)


@dataclass
class Concat:
    """Stores all layers beside each other, and the final state if there is one."""

    spec: CaptureSpec
    dtype: torch.dtype = torch.float32
    longest: int = 1000

    def __call__(self, capture: TargetCapture) -> Sample | None:
        if len(capture.input_ids) > self.longest:
            return None
        states = [capture.hidden_states[i] for i in self.spec.layers]
        sample = {
            "input_ids": capture.input_ids,
            "loss_mask": capture.loss_mask,
            "hidden": torch.cat(states, -1).to(self.dtype),
        }
        if capture.final is not None:
            sample["final"] = capture.final.to(self.dtype)
        return sample


PROMPT = Prompt(index=3, input_ids=torch.arange(5, 45), loss_mask=torch.arange(40) % 2)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, toy_target: Path) -> TransformersEngine:
    return TransformersEngine.load(
        TargetConfig(path=str(toy_target), dtype=request.param), torch.device("cpu")
    )


def spec(final: Any = "none") -> CaptureSpec:
    return CaptureSpec(layers=LAYERS, final=final, fields={})


def store(engine: TransformersEngine, adapter: Concat, **swaps: Any) -> Sample:
    """Return a sample as it is stored: captured among other prompts, in a larger batch."""
    others = [
        Prompt(
            index=i, input_ids=torch.arange(50 + i, 80 + 4 * i), loss_mask=torch.ones(30 + 3 * i)
        )
        for i in range(3)
    ]
    wider = replace(adapter.spec, layers=tuple(range(-1, 6)), final=swaps.pop("final", "none"))
    captured = {c.index: c for c in engine.capture([*others[:2], replace(PROMPT, index=9)], wider)}
    states = captured[9].hidden_states
    taken = {i: states[swaps.get(f"layer_{i}", i)] for i in adapter.spec.layers}
    sample = adapter(replace(captured[9], hidden_states=taken))
    assert sample is not None
    return sample


@pytest.mark.parametrize("final", ["none", "pre_norm", "post_norm"])
def test_the_same_states_from_another_batch_are_equal(engine: TransformersEngine, final: Any):
    adapter = Concat(spec(final))
    stored = store(engine, adapter, final=final)
    fresh = Fresh.of(engine, adapter.spec, PROMPT)
    assert fresh.capture().hidden_states.keys() == set(LAYERS)
    assert compare(fresh, adapter, stored) == []


def test_storing_in_a_coarser_dtype_is_no_problem(engine: TransformersEngine):
    adapter = Concat(spec("post_norm"), torch.bfloat16)
    stored = store(engine, adapter, final="post_norm")
    assert compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored) == []


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", [-1, 1])
def test_one_layer_of_three_off_by_one_is_named(engine: TransformersEngine, layer: int, step: int):
    adapter = Concat(spec())
    stored = store(engine, adapter, **{f"layer_{layer}": layer + step})
    (problem,) = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert f"values: layer {layer} looks like the output of layer {layer + step}." in str(problem)


def test_all_layers_off_by_one_are_named(engine: TransformersEngine):
    adapter = Concat(spec())
    stored = store(engine, adapter, layer_0=1, layer_2=3, layer_4=5)
    problems = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert [str(p).split(".")[0] for p in problems] == [
        f"values: layer {i} looks like the output of layer {i + 1}" for i in LAYERS
    ]


@pytest.mark.parametrize(("said", "was"), [("pre_norm", "post_norm"), ("post_norm", "pre_norm")])
def test_a_final_state_normed_where_it_should_not_be_is_named(
    engine: TransformersEngine, said: Any, was: Any
):
    adapter = Concat(spec(said))
    stored = store(engine, adapter, final=was)
    (problem,) = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert f"values: the final state looks like {was}, not {said}." in str(problem)


def test_another_revisions_values_are_noticed(engine: TransformersEngine, tmp_path: Path):
    adapter = Concat(spec())
    stored = store(engine, adapter)
    save_toy_target(tmp_path, seed=1)
    other = TransformersEngine.load(TargetConfig(path=str(tmp_path)), torch.device("cpu"))
    problems = compare(Fresh.of(other, adapter.spec, PROMPT), adapter, stored)
    assert problems
    assert all(problem.where == "values" for problem in problems)


def test_slightly_tuned_weights_are_noticed(engine: TransformersEngine):
    adapter = Concat(spec())
    stored = store(engine, adapter)
    noise = torch.Generator().manual_seed(0)
    stored["hidden"] = stored["hidden"] * (
        1 + 0.2 * torch.randn(stored["hidden"].shape, generator=noise)
    )
    (problem,) = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert "differ from a fresh capture by " in str(problem)
    assert "another revision or dtype of the target?" in str(problem)


def test_other_tokens_are_noticed(engine: TransformersEngine):
    adapter = Concat(spec())
    stored = store(engine, adapter)
    fresh = Fresh.of(engine, adapter.spec, PROMPT)
    other = dict(stored, loss_mask=1 - stored["loss_mask"])
    (problem,) = compare(fresh, adapter, other)
    assert "field 'loss_mask': differs from a fresh capture at 40 places" in str(problem)
    shorter = {name: tensor[:-2] for name, tensor in stored.items()}
    problems = compare(fresh, adapter, shorter)
    assert "field 'hidden': has shape [38, 96], a fresh capture [40, 96]" in str(problems[0])
    assert "another chat template, tokenizer, data or data.max_length?" in str(problems[0])


def test_a_sample_that_would_now_be_skipped_is_noticed(engine: TransformersEngine):
    stored = store(engine, Concat(spec()))
    strict = Concat(spec(), longest=10)
    (problem,) = compare(Fresh.of(engine, strict.spec, PROMPT), strict, stored)
    assert str(problem) == "sample: is stored, but the strategy now skips its prompt"


def test_fields_that_a_fresh_capture_has_not_are_noticed(engine: TransformersEngine):
    adapter = Concat(spec())
    stored = store(engine, adapter)
    stored["more"] = stored.pop("hidden")
    problems = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert "sample: has the fields input_ids, loss_mask, more, a fresh capture hidden," in str(
        problems[0]
    )


@pytest.mark.parametrize(("moved", "problems"), [(0, 0), (10, 0), (20, 1)])
def test_whole_numbers_made_from_states_may_move_a_little(
    engine: TransformersEngine, moved: int, problems: int
) -> None:
    class Choices(Concat):
        def __call__(self, capture: TargetCapture) -> Sample | None:
            found = super().__call__(capture)
            assert found is not None
            return found | {"choice": capture.input_ids * 2}

    adapter = Choices(spec())
    stored = store(engine, adapter)
    stored["choice"][:moved] += 1
    found = compare(Fresh.of(engine, adapter.spec, PROMPT), adapter, stored)
    assert len(found) == problems
    if problems:
        assert "field 'choice': differs from a fresh capture at 20 places" in str(found[0])


@pytest.mark.parametrize("shape", [(41, 96), (41, 4, 24), (41,)])
def test_distances_are_those_of_whole_rows_however_few_fit(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(shape, generator=draw).bfloat16() for _ in range(2))
    rows = (41, -1) if len(shape) > 1 else (1, -1)
    wide, given = old.double().reshape(rows), new.double().reshape(rows)
    expected = ((wide - given).norm(dim=1) / given.norm(dim=1)).tolist()
    for most in (50, 960, 10**6):  # less than a row, some that do not divide them, all
        monkeypatch.setattr(recapture, "WIDENED", most)
        assert recapture._errors({"x": old}, {"x": new}, ["x"]) == expected
