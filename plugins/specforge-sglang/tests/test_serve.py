"""SGLang as a draft's server: flags, counts, refusals, and a real process that stands in for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import specforge_sglang
import specforge_sglang_capture
import torch
from specforge_sglang import specforge_serve
from specforge_sglang.options import read_options
from specforge_sglang.serve import ACCEPTED, SGLangServer, counted, drafting_flags, serve

from specforge_core.config import TargetConfig
from specforge_core.drafts.export import write_export
from specforge_core.errors import CaptureError, CheckpointError, RunError
from specforge_core.types import Export, ExportFile, NotServed

from .ended import gone

# a server of a few lines: every verification accepts 2 tokens, and 7 ends an answer
LAUNCHER = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
BEHAVE
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(BaseHTTPRequestHandler):
    def reply(self, body, status=200):
        raw = json.dumps(body).encode()
        self.send_response(status); self.end_headers(); self.wfile.write(raw)
    def do_GET(self):
        env = {k: v for k, v in os.environ.items() if "SGLANG" in k}
        pids = [os.getpid(), worker.pid]
        self.reply({"version": "0.5.14", "argv": sys.argv, "env": env, "pids": pids})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids, sampling = body["input_ids"], body["sampling_params"]
        if len(ids) > 8:
            return self.reply({"error": {"message": "the input is too long."}}, 400)
        assert sampling["temperature"] == 0 and sampling["no_stop_trim"]
        ends = sampling["stop_token_ids"] == ids[:1]
        tokens = [1, 2, 3, 4, *ids[:1]] if ends else [1] * sampling["max_new_tokens"]
        meta = {"completion_tokens": len(tokens), "spec_verify_ct": 2, "spec_num_correct_drafts": 4}
        meta["finish_reason"] = {"type": "stop" if ends else "length"}
        self.reply({"output_ids": tokens, "meta_info": meta})
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
BLOCK = {"speculative_algorithm": "BLOCKS"}
CHAIN = {
    "speculative_algorithm": "CHAINS",
    "speculative_num_steps": 5,
    "speculative_num_draft_tokens": 6,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any] | None], Path]:
    def make(flags: dict[str, Any] | None) -> Path:
        path = tmp_path / "export"
        told = {} if flags is None else {"sglang": flags}
        export = Export(config={"a": 1}, weights={"w": torch.ones(2)}, serve=told)
        write_export(export, path, {}, force=True)
        return path

    return make


@pytest.fixture
def stand_in(tmp_path: Path, toy_target: Path) -> Callable[..., TargetConfig]:
    """Return a function that gives a target whose SGLang is LAUNCHER."""

    def make(behave: str = "", **options: Any) -> TargetConfig:
        site = tmp_path / "site"
        (site / "sglang").mkdir(parents=True)
        (site / "sglang" / "__init__.py").touch()
        (site / "sglang" / "launch_server.py").write_text(LAUNCHER.replace("BEHAVE", behave))
        info = site / "sglang-0.5.14.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.14\n")
        given = {"python": sys.executable, "env": {"PYTHONPATH": str(site)}, **options}
        return TargetConfig(
            path=str(toy_target), engine="sglang", dtype="float32", device="cuda:0", options=given
        )

    return make


def test_a_draft_is_served_without_the_plugin_and_counted(
    stand_in: Callable[..., TargetConfig], write: Callable[[dict[str, Any] | None], Path]
) -> None:
    target = stand_in(server_args={"attention_backend": "flashinfer", "mem_fraction_static": 0.3})
    export = write(CHAIN)
    server = serve(target, Path(os.path.relpath(export)), 3)
    assert isinstance(server, SGLangServer)
    try:
        assert server.name == "SGLang 0.5.14"
        told = server._client.get("/server_info")
        ended, cut = server.answer([[7, 5], [8, 5]], 6, frozenset([7]))
        with pytest.raises(RunError, match="did not answer a prompt of 9 tokens: HTTP 400: the in"):
            server.answer([[1] * 9], 6, frozenset())
    finally:
        server.close()
    assert (ended.tokens, ended.verifications, ended.emitted) == ((1, 2, 3, 4, 7), 2, 4)
    assert (cut.tokens, cut.verifications, cut.emitted) == ((1,) * 6, 2, 6)
    argv = " ".join(told["argv"])
    assert "--speculative-algorithm CHAINS --speculative-num-steps 3" in argv
    assert "--speculative-num-draft-tokens 4" in argv
    assert f"--speculative-draft-model-path {export}" in argv
    assert "--disable-radix-cache --chunked-prefill-size -1" in argv
    assert "--attention-backend flashinfer" in argv
    assert "--mem-fraction-static 0.3" in argv
    assert "triton" not in argv
    assert told["env"]["SPECFORGE_SGLANG_CAPTURE"] == "0"
    assert all(gone(pid) for pid in told["pids"])


def test_a_server_that_ends_says_why(
    stand_in: Callable[..., TargetConfig], write: Callable[[dict[str, Any] | None], Path]
) -> None:
    target = stand_in('raise RuntimeError("no such draft")')
    with pytest.raises(CaptureError, match="RuntimeError: no such draft"):
        serve(target, write(BLOCK), 3)


def test_a_chain_is_as_long_as_is_asked_for_and_others_as_exported(
    write: Callable[[dict[str, Any] | None], Path],
) -> None:
    assert drafting_flags(write(BLOCK), 7) == BLOCK
    longer = {"speculative_num_steps": 7, "speculative_num_draft_tokens": 8}
    assert drafting_flags(write(CHAIN), 7) == {**CHAIN, **longer}
    tree = {**CHAIN, "speculative_num_draft_tokens": 33}
    assert drafting_flags(write(tree), 7) == tree
    assert drafting_flags(write({"--speculative-algorithm": "X"}), 7) == {
        "speculative_algorithm": "X"
    }


def test_a_file_of_the_export_is_a_flag_too(tmp_path: Path) -> None:
    told = {"speculative_table_path": ExportFile(name="table.json")}
    export = Export(
        config={"a": 1},
        weights={"w": torch.ones(2)},
        files={"table.json": b"{}"},
        serve={"sglang": told},
    )
    write_export(export, tmp_path / "export", {})
    path = str(tmp_path / "export" / "table.json")
    assert drafting_flags(tmp_path / "export", 7) == {"speculative_table_path": path}


@pytest.mark.parametrize("flags", [{"host": "0.0.0.0"}, {"speculative_num_steps": [1]}])
def test_an_export_gives_flags_of_drafting_only(
    write: Callable[[dict[str, Any] | None], Path], flags: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"is no flag of drafting \(speculative_"):
        drafting_flags(write(flags), 7)


def test_no_method_is_named() -> None:
    for package in (specforge_sglang, specforge_sglang_capture):
        for path in Path(package.__file__).parent.glob("*.py"):
            text = (
                path.read_text()
                .lower()
                .replace("set_dflash_layers_to", "")
                .replace(
                    "set_eagle3_layers_to",
                    "",  # SGLang's own functions
                )
            )
            assert not re.search("dflash|eagle|domino|dspark|medusa", text), path


@pytest.mark.parametrize(
    ("flags", "changes", "reason"),
    [
        (None, {}, "does not say how SGLang serves it"),
        (CHAIN, {"device": "cpu"}, "SGLang drafts on a GPU only"),
        (CHAIN, {"options": {"url": "http://localhost:1"}}, "run without this draft"),
    ],
)
def test_what_is_not_served_says_why(
    stand_in: Callable[..., TargetConfig],
    write: Callable[[dict[str, Any] | None], Path],
    flags: dict[str, Any] | None,
    changes: dict[str, Any],
    reason: str,
) -> None:
    found = specforge_serve(stand_in().model_copy(update=changes), write(flags), 3)
    assert isinstance(found, NotServed)
    assert reason in found.reason
    assert "Try: " in found.reason


def test_another_engine_is_not_ours(tmp_path: Path) -> None:
    assert specforge_serve(TargetConfig(path="x", engine="other"), tmp_path, 3) is None


def test_an_export_without_provenance_is_an_error(
    stand_in: Callable[..., TargetConfig], tmp_path: Path
) -> None:
    target = stand_in()
    assert read_options(target).python
    with pytest.raises(CheckpointError, match=r"provenance\.json cannot be read"):
        serve(target, tmp_path / "none", 3)


def test_answers_of_one_token_need_no_verification() -> None:
    found = counted({"output_ids": [7], "meta_info": {"completion_tokens": 1}}, "SGLang 1")
    assert (found.tokens, found.verifications, found.emitted) == ((7,), 0, 0)


@pytest.mark.parametrize("meta", [{}, {"spec_accept_length": 2.0, "spec_verify_ct": 3}])
def test_an_answer_that_does_not_say_what_was_drafted_is_an_error(meta: dict[str, Any]) -> None:
    body = {"output_ids": [1] * 5, "meta_info": {"completion_tokens": 5, **meta}}
    with pytest.raises(RunError, match="SGLang 1 does not say how much it drafted"):
        counted(body, "SGLang 1")


@pytest.mark.parametrize(
    "answer",
    [
        {"output_ids": 5},
        {"output_ids": [1] * 5, "meta_info": [1]},
        {"output_ids": [1] * 5, "meta_info": {"completion_tokens": "x"}},
        {"output_ids": [1] * 5, "meta_info": {"spec_verify_ct": float("inf")}},
        {"output_ids": [1] * 5, "meta_info": {"spec_verify_ct": 3, "finish_reason": "stop"}},
    ],
)
def test_an_answer_of_other_kinds_is_an_error(answer: dict[str, Any]) -> None:
    if isinstance(meta := answer.get("meta_info"), dict):
        meta.setdefault(ACCEPTED[0], 3)
    with pytest.raises(CaptureError, match="SGLang 1 gives an answer that is not SGLang's"):
        counted(answer, "SGLang 1")


@pytest.mark.parametrize(
    ("last", "unknown"),
    [
        (
            "sglang serve: error: unrecognized arguments: --speculative-new-size 0",
            "--speculative-new-size",
        ),
        ("ValueError: Unknown speculative algorithm name: BLOCKS", "BLOCKS"),
        (
            "ValueError: Cannot find model module. 'NewDraftModel' is not a registered model in "
            "the Transformers library",
            "NewDraftModel",
        ),
        (
            "ValueError: Model architectures ['NewTarget'] are not supported for now.",
            "NewTarget",
        ),
    ],
)
def test_a_version_without_the_method_serves_it_not(
    stand_in: Callable[..., TargetConfig],
    write: Callable[[dict[str, Any] | None], Path],
    last: str,
    unknown: str,
) -> None:
    found = serve(stand_in(f"raise SystemExit({last!r})"), write(BLOCK), 3)
    assert isinstance(found, NotServed)
    assert f"{sys.executable} does not know {unknown}, and cannot serve" in found.reason


def test_a_server_that_ends_for_another_reason_is_an_error(
    stand_in: Callable[..., TargetConfig], write: Callable[[dict[str, Any] | None], Path]
) -> None:
    with pytest.raises(CaptureError, match="out of something"):
        serve(stand_in("raise SystemExit('out of something')"), write(BLOCK), 3)
