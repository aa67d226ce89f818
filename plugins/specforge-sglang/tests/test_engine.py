"""The engine against servers in processes of their own: nothing lost, nothing twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_sglang.engine import SGLangEngine

from specforge_core.errors import CaptureError, ConfigError, RunError
from specforge_core.types import CaptureSpec, GenerateOptions, TargetCapture

CPU = torch.device("cpu")
SPEC = CaptureSpec(layers=(4, -1, 1), final="post_norm", fields={})


def right(capture: TargetCapture) -> bool:
    """Say whether a capture holds what the stand-in gives for its prompt."""
    column = capture.input_ids[:, None].float()
    assert capture.final is not None
    states = {**capture.hidden_states, "final": capture.final}
    base: dict[Any, float] = {-1: -100.0, 1: 100.0, 4: 400.0, "final": 7.0}
    return states.keys() == base.keys() and all(
        torch.equal(state, (base[key] + column).expand(-1, 32)) for key, state in states.items()
    )


def test_next_tokens_and_logsumexp_come_with_the_states(
    shared: Any, target: Any, prompts: Any
) -> None:
    engine = SGLangEngine.load(target(shared()), CPU)
    both = CaptureSpec(layers=(1,), fields={}, next_tokens=True, logsumexp=True)
    head = CaptureSpec(layers=(), fields={}, logsumexp=True)
    for capture in engine.capture(prompts(5, 40), both):
        assert capture.next_tokens is not None
        assert capture.logsumexp is not None
        assert torch.equal(capture.next_tokens, capture.input_ids + 1)
        assert torch.equal(capture.logsumexp, capture.input_ids / 2)
    for capture in engine.capture(prompts(5, 40), head):
        assert (capture.hidden_states, capture.final, capture.next_tokens) == ({}, None, None)
        assert torch.equal(capture.logsumexp, capture.input_ids / 2)
    engine.close()


def test_next_tokens_beyond_the_vocabulary(shared: Any, target: Any, prompts: Any) -> None:
    engine = SGLangEngine.load(target(shared(fault="next")), CPU)
    spec = CaptureSpec(layers=(1,), fields={}, next_tokens=True)
    with pytest.raises(CaptureError, match="next tokens beyond the target's vocabulary of 260"):
        list(engine.capture(prompts(20), spec))
    engine.close()


def test_answers(start: Any, target: Any, prompts: Any) -> None:
    """Those of a server that dies come from the other; a prompt that is refused is marked so."""
    engine = SGLangEngine.load(target(start(), start(), max_requests=4), CPU)
    asked = prompts(*[5] * 20, 501)
    options = GenerateOptions(max_new_tokens=3)
    found = {a.index: a for a in engine.generate(asked, options)}
    last = [int(prompt.input_ids[-1]) for prompt in asked]
    assert all(found[i].tokens == (last[i],) * 3 and not found[i].finished for i in range(20))
    assert found[20].tokens == ()
    assert "the input is longer than 500 tokens" in str(found[20].refused)
    ended = list(engine.generate(asked[:1], GenerateOptions(max_new_tokens=3, eos=frozenset({9}))))
    assert [(a.tokens, a.finished) for a in ended] == [((9,), True)]
    engine.close()


@pytest.mark.parametrize("way", [{}, {"handoff": "http", "receiver_host": "127.0.0.1"}])
def test_every_prompt_comes_back_once_with_its_own_states(
    shared: Any, target: Any, prompts: Any, root: Path, way: dict[str, Any]
) -> None:
    engine = SGLangEngine.load(target(shared(), **way), CPU)
    asked = prompts(5, 40, 1, 3, 200, 40)
    captures = list(engine.capture(asked, SPEC))
    assert sorted(c.index for c in captures) == [0, 1, 2, 3, 4, 5]
    assert all(right(c) for c in captures)
    assert all(c.loss_mask is asked[c.index].loss_mask for c in captures)
    engine.close()
    assert list(root.iterdir()) == []


def test_a_state_outlives_the_engine_and_its_file(
    shared: Any, target: Any, prompts: Any, root: Path
) -> None:
    engine = SGLangEngine.load(target(shared()), CPU)
    (capture,) = engine.capture(prompts(64), SPEC)
    (directory,) = root.iterdir()
    kinds = {path.name.split("-")[0] for path in directory.iterdir()}
    assert kinds == {"lock", ".held"}  # in the file of the first capture, written again
    engine.close()
    capture.hidden_states[4].mul_(1)  # writable
    assert right(capture)


def test_the_work_of_a_killed_server_is_done_by_the_others(
    start: Any, target: Any, prompts: Any
) -> None:
    servers = [start(delay=0.02) for _ in range(3)]
    engine = SGLangEngine.load(target(*servers, max_requests=12), CPU)
    source = engine.capture(prompts(*[10 + i % 7 for i in range(300)]), SPEC)
    captures = [next(source)]
    servers[1].kill()
    captures += source
    assert sorted(c.index for c in captures) == list(range(300))
    assert all(right(c) for c in captures)
    retired = [s for s in engine.pool.servers if s.retired]
    assert [s.client.url for s in retired] == [servers[1].url]
    # how many each depends on the machine
    assert all(s.served > 1 for s in engine.pool.servers if not s.retired)
    assert [s.outstanding for s in engine.pool.servers] == [0, 0, 0]
    engine.close()


@pytest.mark.slow
def test_a_server_that_comes_back_is_used_again(start: Any, target: Any, prompts: Any) -> None:
    first = start(delay=0.01)
    engine = SGLangEngine.load(target(first, patience=60), CPU)
    port = int(first.url.rsplit(":", 1)[1])

    def restart() -> None:
        first.kill()
        # longer than the second between two looks for states that were promised and never came:
        # else they are waited for a minute long (no real server starts so fast)
        time.sleep(1.2)
        start(port)

    worker = threading.Thread(target=restart)
    source = engine.capture(prompts(*[8] * 200), SPEC)
    captures = [next(source)]
    worker.start()
    captures += source
    worker.join()
    assert sorted(c.index for c in captures) == list(range(200))
    assert all(right(c) for c in captures)
    engine.close()


def test_all_servers_gone_is_an_error_that_lists_them(
    start: Any, target: Any, prompts: Any
) -> None:
    servers = [start(), start(fault="dies", after=3)]
    engine = SGLangEngine.load(target(*servers, patience=0.5), CPU)
    servers[0].kill()
    with pytest.raises(RunError, match="no server of the target engine can be used") as caught:
        list(engine.capture(prompts(*[9] * 20), SPEC))
    assert all(s.url in str(caught.value) for s in servers)
    engine.close()


def test_a_server_may_be_down_at_the_start(start: Any, target: Any, prompts: Any) -> None:
    dead, alive = start(), start()
    dead.kill()
    engine = SGLangEngine.load(target(dead, alive), CPU)
    assert len(list(engine.capture(prompts(4, 5), SPEC))) == 2
    engine.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("protocol", "protocol 3 instead of 2"),
        ("rows", r"prompt 1 \(request 1-\d+ at http.*tokens 19 instead of 20"),
        ("width", r"prompt 1 .*width 16 instead of 32.*Does the server run"),
        ("layers", r"prompt 1 .*num_layers 5 instead of 6"),
        ("tokens", r"prompt 1 .*other tokens than were sent"),
        ("torn", r"prompt 1 .*came back damaged"),
        ("refuses", r"prompt 1 .*was not captured: the model has no layer setter"),
        ("cached", r"prompt 1 .*3 of its tokens came from the radix cache"),
    ],
)
def test_a_wrong_capture_is_an_error_that_names_the_request(
    shared: Any, target: Any, prompts: Any, root: Path, fault: str, message: str
) -> None:
    engine = SGLangEngine.load(target(shared(fault=fault)), CPU)
    with pytest.raises(CaptureError, match=message):
        list(engine.capture(prompts(3, 20), SPEC))
    engine.close()
    assert list(root.iterdir()) == []


def test_a_prompt_that_the_server_refuses_is_named(shared: Any, target: Any, prompts: Any) -> None:
    engine = SGLangEngine.load(target(shared()), CPU)
    message = r"prompt 0 .*was refused: HTTP 400: the input is longer.*Check data.max_length"
    with pytest.raises(CaptureError, match=message):
        list(engine.capture(prompts(501), SPEC))
    assert len(list(engine.capture(prompts(30), SPEC))) == 1  # still usable
    engine.close()


@pytest.mark.parametrize("way", ["files", "http"])
def test_a_server_without_the_plugin_is_an_error_that_says_how_to_start_it(
    shared: Any, target: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("specforge_sglang.engine.ARRIVAL_SECONDS", 0.3)
    server = shared(fault="silent", at_once=True)
    with pytest.raises(CaptureError, match=r"plugin is not active.*specforge_sglang_capture"):
        SGLangEngine.load(target(server, handoff=way, receiver_host="127.0.0.1"), CPU)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"version": "0.5.9"}, r"0\.5\.9, which is older than 0\.5\.14.*pip install"),
        ({"disable_radix_cache": False}, "needs: --disable-radix-cache"),
        ({"chunked_prefill_size": 8192}, "needs: --chunked-prefill-size -1"),
        ({"disable_cuda_graph": False}, "needs: --disable-cuda-graph"),
        ({"pp_size": 2}, "needs: --pp-size 1"),
    ],
)
def test_a_server_that_cannot_capture_is_refused_at_once(
    shared: Any, target: Any, info: dict[str, Any], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        SGLangEngine.load(target(shared(info=info)), CPU)


def test_no_more_is_on_its_way_than_allowed(shared: Any, target: Any, prompts: Any) -> None:
    server = shared()
    one = 50 * (4 * 32 * 4 + 8)  # bytes of one capture
    engine = SGLangEngine.load(target(server, max_bytes=3 * one), CPU)
    before = server.served()
    source = engine.capture(prompts(*[50] * 30), SPEC)
    next(source)
    time.sleep(1.0)  # a trainer that is busy
    assert server.served() - before <= 3
    assert len(list(source)) == 29
    engine.close()


def test_a_capture_larger_than_the_limit_still_runs_alone(
    shared: Any, target: Any, prompts: Any
) -> None:
    engine = SGLangEngine.load(target(shared(), max_bytes=10), CPU)
    assert len(list(engine.capture(prompts(50, 60), SPEC))) == 2
    engine.close()


def test_a_capture_that_is_given_up_leaves_nothing(
    shared: Any, target: Any, prompts: Any, root: Path
) -> None:
    engine = SGLangEngine.load(target(shared(delay=0.05), max_requests=4), CPU)
    source = engine.capture(prompts(*[20] * 40), SPEC)
    next(source)
    source.close()
    assert len(list(engine.capture(prompts(*[20] * 5), SPEC))) == 5
    engine.close()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            CaptureSpec(layers=(6,), final="none", fields={}),
            r"layers \[6\] are not in the target: .* 0 to 5",
        ),
        (CaptureSpec(layers=(), final="none", fields={}), "no states at all"),
    ],
)
def test_layers_that_are_not_there_are_named(
    shared: Any, target: Any, prompts: Any, spec: CaptureSpec, message: str
) -> None:
    engine = SGLangEngine.load(target(shared()), CPU)
    with pytest.raises(CaptureError, match=message):
        list(engine.capture(prompts(4), spec))
    engine.close()


def test_token_ids_beyond_the_vocabulary_are_named(shared: Any, target: Any, prompts: Any) -> None:
    engine = SGLangEngine.load(target(shared()), CPU)
    asked = prompts(4)
    asked[0].input_ids[2] = 260
    with pytest.raises(CaptureError, match=r"prompt 0 has token ids .* 0 to 259"):
        list(engine.capture(asked, SPEC))
    engine.close()


def test_an_interpreter_that_is_not_there_is_named(target: Any, tmp_path: Path) -> None:
    missing = tmp_path / "absent" / "python"
    with pytest.raises(ConfigError, match=r"absent.*target\.options\.python="):
        SGLangEngine.load(target(python=str(missing)), CPU)


@pytest.mark.parametrize("fault", ["layers", "tokens", "torn", "width", "refuses", "protocol"])
def test_no_message_holds_the_token_of_a_receiver(
    shared: Any, target: Any, prompts: Any, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    way = {"handoff": "http", "receiver_host": "127.0.0.1"}
    engine = SGLangEngine.load(target(shared(), **way), CPU)
    shared(fault=fault)
    token = engine._handoff.place.split("/")[1]
    with pytest.raises(CaptureError) as error:
        list(engine.capture(prompts(20), SPEC))
    engine.close()
    assert len(token) > 16
    assert token not in str(error.value) + "".join(capsys.readouterr())
