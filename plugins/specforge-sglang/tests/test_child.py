"""A child server starts with the right flags, says why it ended, and never outlives its parent.

`sglang` is a package of a few lines here, whose launcher answers over HTTP, forks a worker, and
prints what it was given.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from specforge_sglang.child import (
    CAPTURE,
    PLAIN,
    ChildServer,
    as_arguments,
    free_port,
    server_flags,
    with_key,
    write_overlay,
)
from specforge_sglang.client import Client
from specforge_sglang.options import read_options

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.info import load_target_info
from specforge_core.testing.forked import SECONDS, python

from .ended import gone

LAUNCHER = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import entry_points
BEHAVE
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = sys.argv[sys.argv.index("--api-key") + 1] if "--api-key" in sys.argv else ""
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self.send_response(401); self.end_headers()
            return
        found = [e.value for e in entry_points(group="sglang.srt.plugins")]
        body = {"argv": sys.argv[1:], "env": dict(os.environ), "plugins": found}
        body["pids"] = [os.getpid(), worker.pid]
        body["cwd"] = os.getcwd()
        raw = json.dumps(body).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(raw)
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
PARENT = """
import json, os, sys, time
from specforge_sglang.child import ChildServer
from specforge_sglang.options import read_options
from specforge_core.target.info import load_target_info
from specforge_core.config import TargetConfig
target = TargetConfig(**json.loads(sys.argv[1]))
child = ChildServer(target, load_target_info(target), read_options(target))
client = child.client(20.0)
child.wait(client, 60)
print(json.dumps(client.get("/")), flush=True)
os.kill(os.getpid(), 9)
"""

Configure = Callable[..., TargetConfig]


@pytest.fixture
def configure(tmp_path: Path, toy_target: Path) -> Configure:
    def make(behave: str = "", version: str | None = "0.5.14", **options: Any) -> TargetConfig:
        site = tmp_path / "site"
        (site / "sglang").mkdir(parents=True)
        (site / "sglang" / "__init__.py").touch()
        (site / "sglang" / "launch_server.py").write_text(LAUNCHER.replace("BEHAVE", behave))
        if version is not None:
            info = site / f"sglang-{version}.dist-info"
            info.mkdir()
            text = f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
            (info / "METADATA").write_text(text)
        chosen = {"python": sys.executable, "env": {"PYTHONPATH": str(site)}, **options}
        return TargetConfig(path=str(toy_target), engine="sglang", device="cpu", options=chosen)

    return make


def start(target: TargetConfig) -> ChildServer:
    return ChildServer(target, load_target_info(target), read_options(target))


def test_a_child_gets_its_flags_and_the_plugin(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "MASTER_PORT": "29500", "PYTHONPATH": "/trainer"}.items():
        monkeypatch.setenv(name, value)
    target = configure(server_args={"tp-size": 2})
    child = start(target)
    client = child.client(20.0)
    child.wait(client, 60)
    told = client.get("/")
    child.close()
    argv = told["argv"]
    assert argv[argv.index("--model-path") + 1] == target.path
    assert argv[argv.index("--tp-size") + 1] == "2"
    assert argv[argv.index("--dtype") + 1] == "float32"  # the checkpoint's own
    assert {"--disable-radix-cache", "--disable-cuda-graph", "--skip-tokenizer-init"} <= set(argv)
    assert "specforge_sglang_capture:register" in told["plugins"]
    assert told["env"]["SPECFORGE_SGLANG_CAPTURE"] == "1"
    assert "RANK" not in told["env"]
    assert told["env"]["MASTER_PORT"] == argv[argv.index("--port") + 1]  # not the trainer's
    assert told["env"]["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].startswith(
        f"file://{told['cwd']}"
    )
    assert told["env"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert "/trainer" not in told["env"]["PYTHONPATH"]
    assert told["env"]["PYTHONPATH"].split(os.pathsep)[0] == told["cwd"]  # for its own children
    assert all(gone(pid) for pid in told["pids"])
    assert not Path(told["cwd"]).exists()


@pytest.mark.parametrize("flags", [{"dist_init_addr": "10.0.0.1:5000"}, {"dp-size": 2}])
def test_ranks_of_several_machines_or_groups_meet_as_sglang_has_it(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str | int]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as a training sets it for its ranks
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")  # as a user does
    monkeypatch.setenv("MASTER_PORT", "5001")
    child = start(configure(server_args=flags))
    client = child.client(20.0)
    child.wait(client, 60)
    told = client.get("/")
    child.close()
    assert not {"MASTER_PORT", "GLOO_SOCKET_IFNAME"} & told["env"].keys()
    assert told["env"]["NCCL_SOCKET_IFNAME"] == "eth7"


def test_an_interpreter_that_sets_its_own_path_finds_the_plugin(
    configure: Configure, tmp_path: Path
) -> None:
    target = configure(env={})
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    options = {**target.options, "python": str(script)}
    child = start(target.model_copy(update={"options": options}))
    client = child.client(20.0)
    child.wait(client, 60)
    told = client.get("/")
    child.close()
    assert "specforge_sglang_capture:register" in told["plugins"]


@pytest.mark.parametrize(
    ("behave", "version", "message"),
    [
        ("", None, r"SGLang is not installed in .*Try: .* -m pip install 'sglang>=0\.5\.14'"),
        ("", "0.5.9", r"SGLang 0\.5\.9 is older than 0\.5\.14\. Try: "),
        ("sys.exit('no memory for the KV cache')", "0.5.14", "no memory for the KV cache"),
    ],
)
def test_a_child_that_ends_says_why(
    configure: Configure, behave: str, version: str | None, message: str
) -> None:
    child = start(configure(behave, version))
    with pytest.raises(CaptureError, match=message):
        child.wait(child.client(5.0), 60)
    child.close()


def test_what_a_child_says_last_is_shown_without_its_key(configure: Configure) -> None:
    behave = "print(sys.argv[sys.argv.index('--api-key'):], flush=True); sys.exit(3)"
    child = start(configure(behave))
    with pytest.raises(CaptureError, match=r"ended with status 3(.|\n)*--api-key") as found:
        child.wait(child.client(5.0), 60)
    assert child.client(5.0).key
    assert str(child.client(5.0).key) not in str(found.value)
    child.close()


@pytest.mark.parametrize(
    ("launch", "given"),
    [(CAPTURE, {"api_key": "a-secret-key"}), (PLAIN, {})],
    ids=["its own", "made for once"],
)
def test_the_key_of_a_child_is_in_no_command_line_and_is_sent(
    configure: Configure, launch: tuple[str, str], given: dict[str, str]
) -> None:
    """Anybody on the machine reads the command lines of all processes, and may ask its ports."""
    target = configure(server_args={**given, "tp-size": 2})
    child = ChildServer(target, load_target_info(target), read_options(target), launch=launch)
    client = child.client(20.0)
    child.wait(client, 60)
    with pytest.raises(CaptureError, match=r"refuses what it is asked: HTTP 401(.|\n)*api_key=KEY"):
        child.wait(Client(child.url, 5.0), 60)
    told = client.get("/")
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in told["pids"]]
    child.close()
    key = told["argv"][told["argv"].index("--api-key") + 1]
    assert key == given.get("api_key", key)
    assert len(key) >= 12
    assert b"--tp-size" in lines[0]
    assert all(key.encode() not in line for line in lines)
    assert key not in str(told["env"])  # which its workers get
    assert key not in repr(client)


def test_a_key_is_made_where_sglang_takes_one() -> None:
    one, other = (str(with_key({"tp_size": 2})["api_key"]) for _ in range(2))
    assert len(one) == len(other) == 32
    assert one != other
    for given in ({"api_key": "k"}, {"api_key": False}, {"tokenizer_worker_num": 2}):
        assert with_key(given) == given


def test_a_child_that_never_answers_is_an_error(configure: Configure) -> None:
    child = start(configure("import time; print('loading', flush=True); time.sleep(600)"))
    until = time.monotonic() + 60
    while "loading" not in child.last_words() and time.monotonic() < until:
        time.sleep(0.02)
    message = r"did not start in 1 s(.|\n)*loading\n(.|\n)*start_timeout"
    with pytest.raises(CaptureError, match=message):
        child.wait(Client(child.url, 5.0), 1.0)
    child.close()


def test_a_child_does_not_outlive_a_killed_parent(configure: Configure, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = python(script, configure().model_dump_json(), env=os.environ)
    out, _ = parent.communicate(timeout=SECONDS)
    assert parent.returncode == -9
    told = json.loads(out)
    assert len(told["pids"]) == 2
    assert all(gone(pid) for pid in told["pids"])
    assert not Path(told["cwd"]).exists()


@pytest.mark.slow
def test_the_overlay_holds_nothing_but_the_capture_part(tmp_path: Path) -> None:
    write_overlay(tmp_path / "site")
    names = sorted(path.name for path in (tmp_path / "site").iterdir())
    assert len(names) == 2
    assert names[0] == "specforge_sglang_capture"
    assert names[1].startswith("specforge_sglang_capture-")
    script = textwrap.dedent("""
        import sys
        import specforge_sglang_capture.taps, specforge_sglang_capture.__main__
        foreign = {"specforge_core", "pydantic", "transformers"} & sys.modules.keys()
        sys.exit(f"imported {foreign}" if foreign else 0)
    """)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)


def test_the_dtype_is_the_checkpoints_own(toy_target: Path) -> None:
    target = TargetConfig(path=str(toy_target), engine="sglang", options={"python": "p"})
    info, options = load_target_info(target), read_options(target)
    assert server_flags(target, info, options)["dtype"] == "float32"
    half = target.model_copy(update={"dtype": "bfloat16"})
    assert server_flags(half, info, options)["dtype"] == "bfloat16"


def test_a_gpu_is_chosen_by_its_number(toy_target: Path) -> None:
    target = TargetConfig(path=str(toy_target), device="cuda:3", options={"python": "p"})
    flags = server_flags(target, load_target_info(target), read_options(target))
    assert flags["base_gpu_id"] == 3
    assert "max_total_tokens" not in flags


def test_flags_as_a_command_line() -> None:
    assert as_arguments({"tp_size": 2, "skip": True, "trust": False}) == [
        "--tp-size",
        "2",
        "--skip",
    ]


def test_a_port_leaves_room_for_the_one_sglang_takes_above_it() -> None:
    for _ in range(20):
        assert 1024 < free_port() + 10_000 <= 65_535


def test_two_ranks_of_one_seed_find_ports_of_their_own() -> None:
    """Both look before either server listens."""
    before, found = random.getstate(), set()
    for _ in range(5):
        random.seed(0)
        found.add(free_port())
    random.setstate(before)
    assert len(found) > 1
