"""Stock SGLang captures what transformers does.  One server for the module, of each version."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from specforge_openai.http_json import Refused
from specforge_sglang.client import Client
from specforge_sglang.engine import SGLangEngine

from specforge_core.capture.job import run_capture
from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.verify import verify_directory
from specforge_core.config import TargetConfig
from specforge_core.drafts.checkpoint import find, read_state
from specforge_core.errors import CaptureError
from specforge_core.load import load_config
from specforge_core.target.engine import TransformersEngine
from specforge_core.testing.toy import write_conversations
from specforge_core.train.run import train
from specforge_core.types import CaptureSpec, GenerateOptions, TargetCapture

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames")


@pytest.fixture(scope="module")
def engine(sglang_python: str, toy_target: Path, directory: Path) -> Iterator[SGLangEngine]:
    """A server started as a child, with every default: SGLang takes the key that is made for it."""
    config = TargetConfig(
        path=str(toy_target),
        engine="sglang",
        device="cpu",
        batch_tokens=1024,
        options={
            "python": sglang_python,
            "directory": str(directory),
            "env": {"SPECFORGE_SGLANG_RECEIVERS": "127.0.0.1"},
        },
    )
    made = SGLangEngine.load(config, CPU)
    yield made
    made.close()
    assert list(directory.iterdir()) == []


@pytest.fixture(scope="module")
def reference(toy_target: Path) -> TransformersEngine:
    return TransformersEngine.load(TargetConfig(path=str(toy_target), device="cpu"), CPU)


@pytest.fixture
def by_url(
    engine: SGLangEngine, toy_target: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The target section of a config that names the running server."""
    (server,) = engine.pool.servers
    monkeypatch.setenv("SPECFORGE_API_KEY", str(server.client.key))
    options = {"url": server.client.url, "directory": str(directory)}
    return {"path": str(toy_target), "engine": "sglang", "device": "cpu", "options": options}


@pytest.mark.parametrize(
    ("layers", "final"),
    [
        ((1, 3), "none"),
        ((4, 0, 2), "post_norm"),  # in the order asked for
        ((-1, 5), "none"),  # the embedding and the last layer: not of the setter
        ((-1, 0, 1, 2, 3, 4, 5), "pre_norm"),
        ((), "post_norm"),
        ((), "pre_norm"),
    ],
)
def test_states_are_those_of_transformers(
    engine: SGLangEngine,
    reference: TransformersEngine,
    prompts: Any,
    same: Any,
    layers: Any,
    final: Any,
) -> None:
    spec = CaptureSpec(layers=layers, final=final, fields={})
    asked = prompts(5, 37, 100, 1, 200, 37)
    same(list(engine.capture(asked, spec)), list(reference.capture(asked, spec)))


@pytest.mark.parametrize("asked", [{"next_tokens"}, {"logsumexp"}, {"next_tokens", "logsumexp"}])
def test_the_head_is_the_targets_own(
    engine: SGLangEngine, reference: TransformersEngine, prompts: Any, same: Any, asked: set[str]
) -> None:
    """Also where a batch is longer than the rows that are worked on at a time."""
    given = dict.fromkeys(asked, True)
    spec = CaptureSpec(layers=(1,), final="post_norm", fields={}, **given)
    asked_for = prompts(5, 37, 500, 1, 400)
    same(list(engine.capture(asked_for, spec)), list(reference.capture(asked_for, spec)))


def test_answers_are_those_of_transformers(
    engine: SGLangEngine, reference: TransformersEngine, prompts: Any
) -> None:
    asked = prompts(5, 37, 100, 1)
    options = GenerateOptions(max_new_tokens=16, eos=frozenset(range(0, 260, 3)))
    key = lambda answer: answer.index  # noqa: E731
    found = sorted(engine.generate(asked, options), key=key)
    assert found == sorted(reference.generate(asked, options), key=key)
    assert {len(answer.tokens) for answer in found} != {16}


def test_a_prompt_captured_again_is_captured_in_full(
    engine: SGLangEngine, reference: TransformersEngine, prompts: Any, same: Any
) -> None:
    spec = CaptureSpec(layers=(2,), final="none", fields={})
    (prompt,) = prompts(60)
    for _ in range(3):  # a radix cache would give only the last row
        same(list(engine.capture([prompt], spec)), list(reference.capture([prompt], spec)))


def test_requests_for_different_layers_run_together(
    engine: SGLangEngine, reference: TransformersEngine, prompts: Any, same: Any
) -> None:
    specs = [
        CaptureSpec(layers=(0, 3), final="none", fields={}),
        CaptureSpec(layers=(4,), final="post_norm", fields={}),
        CaptureSpec(layers=(-1, 1, 2), final="pre_norm", fields={}),
    ]
    asked = prompts(*[20 + i for i in range(12)])
    found: list[list[TargetCapture]] = [[], [], []]

    def run(number: int) -> None:
        found[number] = list(engine.capture(asked, specs[number]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spec, captures in zip(specs, found, strict=True):
        same(captures, list(reference.capture(asked, spec)))


def test_states_come_over_http_too(
    by_url: dict[str, Any], reference: TransformersEngine, prompts: Any, same: Any
) -> None:
    options = {**by_url["options"], "handoff": "http", "receiver_host": "127.0.0.1"}
    spec = CaptureSpec(layers=(1, 4), final="post_norm", fields={})
    made = SGLangEngine.load(TargetConfig(**{**by_url, "options": options}), CPU)
    asked = prompts(9, 150, 30)
    same(list(made.capture(asked, spec)), list(reference.capture(asked, spec)))
    made.close()


def test_a_prompt_beyond_the_context_is_named(engine: SGLangEngine, prompts: Any) -> None:
    message = r"prompt 0 .*600 tokens.* longer than the model's context length.*data\.max_length"
    with pytest.raises(CaptureError, match=message):
        list(engine.capture(prompts(600), CaptureSpec(layers=(1,), final="none", fields={})))


@pytest.fixture
def config(tmp_path: Path, by_url: dict[str, Any]) -> Path:
    raw: dict[str, Any] = {
        "target": by_url,
        "strategy": {"name": "linear"},
        "data": {"train": [str(write_conversations(tmp_path / "train.jsonl", 12))]},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 4, "batch_size": 2, "device": "cpu", "log_every": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_verify_finds_a_capture_equal_to_transformers(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    where = f"data.capture_dir={tmp_path / 'capture'}"
    run_capture(*load_config(config, (where,)))
    directory = tmp_path / "capture"
    manifest = CaptureManifest.read(directory)
    assert (manifest.num_samples, manifest.complete) == (12, True)
    again = load_config(config, (where, "target.engine=transformers", "target.options={}"))
    verify_directory(directory, *again, 6)


def test_online_training_from_a_server(config: Path) -> None:
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    report = train(*load_config(config))
    assert report.step == 4


def test_answers_of_the_server_are_trained_on(config: Path, tmp_path: Path) -> None:
    """They are asked for while captures are under way, and make the next epoch larger."""
    pytest.importorskip("specforge_linear", reason="the linear example is not installed")
    prompts = write_conversations(tmp_path / "prompts.jsonl", 5, seed=1)
    grows = ("train.max_steps=9", "train.regenerate_every=1", "train.regenerate_prompts=3")
    answers = ("regenerate.max_new_tokens=5", "regenerate.keep_unfinished=true")
    train(*load_config(config, (*grows, *answers, f"regenerate.prompts=[{prompts}]")))
    files = sorted((tmp_path / "run" / "regenerated").iterdir())
    assert [file.name for file in files] == ["00000000-00000003.jsonl", "00000003-00000005.jsonl"]
    grown = read_state(find(tmp_path / "run")).grown
    assert grown is not None
    assert (grown.epoch, grown.begin, len(grown.files)) == (1, 12, 2)


def test_the_key_of_a_server_is_in_no_command_line(engine: SGLangEngine) -> None:
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            lines.append(process.read_bytes())
    assert any(b"--skip-tokenizer-init" in line for line in lines)
    key = str(engine.pool.servers[0].client.key).encode()
    assert not any(key in line for line in lines)
    with pytest.raises(Refused, match="HTTP 401"):
        Client(engine.pool.servers[0].client.url, 5.0).get("/server_info")


def test_nothing_of_a_server_hears_other_machines(engine: SGLangEngine) -> None:
    """Torch's own store would, under tcp://127.0.0.1 too."""
    port = int(engine.pool.servers[0].client.url.rsplit(":", 1)[1])
    group, sockets = os.getpgid(serving(port)), set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getpgid(int(process.name)) == group:
                sockets |= {str(number.readlink()) for number in (process / "fd").iterdir()}
    heard = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, number = fields[1].split(":")
                heard[int(number, 16)] = address
    assert heard.pop(port) == "0100007F"
    assert set(heard.values()) <= {"0100007F", "00000000000000000000000001000000"}, heard


def test_a_child_that_is_killed_is_an_error_with_its_last_words(
    engine: SGLangEngine, prompts: Any
) -> None:
    """The last test of each version: the server is gone then, and leaves nothing behind."""
    source = engine.capture(
        prompts(*[50] * 400), CaptureSpec(layers=(1, 2), final="post_norm", fields={})
    )
    next(source)
    (url,) = (server.client.url for server in engine.pool.servers)
    os.kill(serving(int(url.rsplit(":", 1)[1])), signal.SIGKILL)
    with pytest.raises(CaptureError, match=r"SGLang ended with status -9\. Its last lines:"):
        list(source)


def serving(port: int) -> int:
    """Return the process that was started with a port."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # another process, which has ended
            words = path.read_bytes().split(b"\0")
            if str(port).encode() in words and b"specforge_sglang_capture" in words:
                return int(path.parent.name)
    raise AssertionError(f"no process was started with port {port}")
