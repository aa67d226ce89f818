"""Hooks sort a batch's states by request, whatever SGLang's model hands them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specforge_sglang_capture.ask import Ask
from specforge_sglang_capture.frame import Frame, unpack
from specforge_sglang_capture.hooks import before_forward
from specforge_sglang_capture.parts import finite_advice
from specforge_sglang_capture.taps import Taps

from .model_stand_in import HIDDEN, LAYERS, Model, NoSetter


class Collect:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.frames: dict[str, Frame] = {}

    def put(self, parcel: Any) -> None:
        self.frames[parcel.ask.name] = unpack(bytearray(b"".join(parcel.pieces())))


def ask(name: str, layers: tuple[int, ...], final: Any = "none", head: Any = ()) -> str:
    return str(Ask(name, "files", "d", layers, final, head))


def run(
    model: NoSetter, lengths: list[int], rids: list[str], writes: bool = True, **batch: Any
) -> dict[str, Frame]:
    found = Collect()
    taps = Taps(model, LAYERS, writes, found)  # type: ignore[arg-type]
    mode = SimpleNamespace(is_extend=lambda: batch.pop("extends", True))
    cached = batch.pop("cached", [0] * len(lengths))
    given = SimpleNamespace(
        rids=rids, forward_mode=mode, extend_seq_lens_cpu=lengths, extend_prefix_lens_cpu=cached
    )
    runner = SimpleNamespace(_specforge_taps=taps)
    before_forward(runner, given)
    model(torch.arange(sum(lengths)), given)
    return found.frames


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_sglang_capture.taps.version", lambda _: "0.5.14")


@pytest.mark.parametrize("packs", [False, True])
def test_every_request_gets_its_rows_of_its_layers(packs: bool) -> None:
    model = Model()
    model.packs = packs
    asks = [
        ask("a", (-1, 1)),
        "someone-else",
        ask("b", (2, 0), "post_norm"),
        ask("c", (), "pre_norm"),
    ]
    frames = run(model, [2, 3, 1, 2], asks)
    assert frames.keys() == {"a", "b", "c"}
    columns = {name: [s[:, 0].tolist() for s in frame.states] for name, frame in frames.items()}
    # tokens 0 to 7; layer i adds 1; the final norm multiplies by 10
    assert columns == {
        "a": [[0, 1], [2, 3]],
        "b": [[8], [6], [80]],
        "c": [[9, 10]],
    }
    ids = {name: f.input_ids.tolist() for name, f in frames.items() if f.input_ids is not None}
    assert ids == {"a": [0, 1], "b": [5], "c": [6, 7]}


def test_the_choice_of_layers_follows_the_requests() -> None:
    model = Model()
    for layers, column in (((0,), [[1]]), ((0, 1), [[1], [2]]), ((1,), [[2]])):
        frames = run(model, [1], [ask("a", layers)])
        assert [s[:, 0].tolist() for s in frames["a"].states] == column


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    model = Model()
    add = model.model.layers[1].register_forward_hook(
        lambda module, args, output: (output[0].index_fill(0, torch.tensor([2]), value), output[1])
    )
    frames = run(model, [2, 2], [ask("a", (0, 1)), ask("b", (0, 1))])
    add.remove()
    assert frames["a"].error is None
    error = frames["b"].error
    assert error is not None
    assert error.startswith("the state of layer 1 is not finite (torch.float32). No dtype is wider")
    assert error.endswith("Try another target.revision or target.path")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wider_dtype_is_advised_where_there_is_one(dtype: torch.dtype) -> None:
    assert finite_advice(dtype) == "Try: target.dtype=float32"


def test_what_becomes_of_a_tensor_after_the_pass_does_not_matter() -> None:
    class Later(Collect):
        def put(self, parcel: Any) -> None:
            waiting.append(parcel)

    waiting: list[Any] = []
    model, found = Model(), Collect()
    taps = Taps(model, LAYERS, True, Later())  # type: ignore[arg-type]
    ids = torch.arange(3)
    mode = SimpleNamespace(is_extend=lambda: True)
    batch = SimpleNamespace(
        rids=[ask("a", (1,), "post_norm")],
        forward_mode=mode,
        extend_seq_lens_cpu=[3],
        extend_prefix_lens_cpu=[0],
    )
    taps.begin(batch)
    model(ids, batch).zero_()  # the final state
    ids.zero_()
    for parcel in waiting:
        found.put(parcel)
    frame = found.frames["a"]
    assert frame.input_ids is not None
    assert frame.input_ids.tolist() == [0, 1, 2]
    assert [s[:, 0].tolist() for s in frame.states] == [[2, 3, 4], [30, 40, 50]]


def test_tokens_from_a_cache_are_refused() -> None:
    frames = run(Model(), [2], [ask("a", (0,))], cached=[5])
    assert "5 tokens of a prompt were not run" in str(frames["a"].error)
    assert "--disable-radix-cache" in str(frames["a"].error)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((3,), "there is no layer 3 in Model: it has layers 0 to 2"),
        ((-2,), "there is no layer -2"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...], message: str) -> None:
    frames = run(Model(), [2, 2], [ask("a", layers), ask("b", (1,))])
    assert message in str(frames["a"].error)
    assert frames["b"].error is None


def test_a_model_without_a_setter_is_refused() -> None:
    frames = run(NoSetter(), [2], [ask("a", (0,))])
    assert "NoSetter cannot hand out layers: it has no set_..._layers_to_capture" in str(
        frames["a"].error
    )


def test_a_model_that_ignores_its_setter_is_refused() -> None:
    model = Model()
    model.set_eagle3_layers_to_capture = lambda layers: None  # type: ignore[method-assign]
    assert run(model, [2], [ask("a", (0,))])["a"].error == "Model did not hand out layer 0"


def test_too_few_layers_are_refused() -> None:
    model = Model()
    model.set_eagle3_layers_to_capture = lambda layers: setattr(  # type: ignore[method-assign]
        model.model, "layers_to_capture", [1]
    )
    error = run(model, [2], [ask("a", (0, 1))])["a"].error
    assert error == "SGLang gave 1 layers where 2 were asked for"


def test_a_batch_of_parts_is_refused() -> None:
    found = Collect()
    taps = Taps(Model(), LAYERS, True, found)  # type: ignore[arg-type]
    mode = SimpleNamespace(is_extend=lambda: True)
    batch = SimpleNamespace(
        rids=[ask("a", (0,))],
        forward_mode=mode,
        extend_seq_lens_cpu=[3],
        extend_prefix_lens_cpu=[0],
    )
    taps.begin(batch)
    taps.model(torch.arange(2), batch)
    assert found.frames["a"].error == "the batch holds 2 tokens for prompts of 3"


def test_only_one_rank_hands_over() -> None:
    assert run(Model(), [2], [ask("a", (0,))], writes=False) == {}


def test_decoding_hands_nothing_over() -> None:
    assert run(Model(), [2], [ask("a", (0,))], extends=False) == {}


def test_a_setter_that_hands_out_something_else_is_refused() -> None:
    model = Model()
    model.model.forgets = True
    error = str(run(model, [4], [ask("a", (1,))])["a"].error)
    assert error.startswith("what SGLang 0.5.14 hands out for layer 1 of Model is not that layer's")
    assert "target.engine=transformers" in error


def test_a_layer_is_proven_once() -> None:
    found = Collect()
    taps = Taps(Model(), LAYERS, True, found)  # type: ignore[arg-type]
    assert taps.unproven == {0, 1}
    mode = SimpleNamespace(is_extend=lambda: True)
    batch = SimpleNamespace(
        rids=[ask("a", (1,))],
        forward_mode=mode,
        extend_seq_lens_cpu=[2],
        extend_prefix_lens_cpu=[0],
    )
    taps.begin(batch)
    taps.model(torch.arange(2), batch)
    assert taps.unproven == {0}


def test_a_setter_that_fails_does_not_end_the_server() -> None:
    def fails(layers: list[int]) -> None:
        raise ValueError("DFLASH only")

    model = Model()
    model.set_eagle3_layers_to_capture = fails  # type: ignore[method-assign]
    error = run(model, [2], [ask("a", (0,))])["a"].error
    assert error == "the layer setter failed: ValueError: DFLASH only"


def test_the_head_runs_on_all_rows_a_few_at_a_time_and_each_request_gets_its_own() -> None:
    model = Model()
    asks = [
        ask("a", (1,), "post_norm", ("next_tokens", "logsumexp")),
        ask("b", (), "none", ("logsumexp",)),
        ask("c", (1,)),
    ]
    frames = run(model, [600, 5, 2], asks)
    assert model.logits_processor.rows == [512, 95]
    a, b, c = (frames[name] for name in "abc")
    logits = a.states[-1] @ torch.eye(HIDDEN, 7).roll(2, 1)
    assert a.next_tokens is not None
    assert torch.equal(a.next_tokens, logits.argmax(-1))
    torch.testing.assert_close(a.logsumexp, logits.logsumexp(-1))
    assert b.logsumexp is not None
    assert (len(b.logsumexp), b.states, b.next_tokens) == (5, (), None)
    assert (c.next_tokens, c.logsumexp, len(c.states)) == (None, None, 1)


def test_a_rank_that_hands_nothing_over_runs_its_part_of_the_head() -> None:
    model = Model()
    assert run(model, [3], [ask("a", (1,), "none", ("next_tokens",))], writes=False) == {}
    assert model.logits_processor.rows == [3]


def test_a_request_of_another_protocol_is_refused_with_the_next_command() -> None:
    frames = run(Model(), [3, 4], ["specforge|1|files|d|1|none|old", ask("b", (1,))])
    assert "speaks protocol 2 in the server and 1 in the trainer" in str(frames["old"].error)
    assert "pip install -U specforge-sglang where specforge runs" in str(frames["old"].error)
    assert len(frames["b"].states) == 1
    newer = run(Model(), [3], ["specforge|3|files|d|what|ever|it|is|new"])["new"]
    assert "pip install -U specforge-sglang where SGLang runs" in str(newer.error)
