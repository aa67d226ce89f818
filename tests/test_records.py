"""No secret of a config is stored, printed, or told to anyone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specforge_core.errors import ConfigError, RunError
from specforge_core.load import apply_override
from specforge_core.process import describe
from specforge_core.records import MASK, in_error, masked, secret_values
from specforge_core.testing.forked import run
from specforge_core.testing.plugin import FakeSite

from .runs import linear_run

SECRETS = [f"{word}-1a2B3c4D5e6F7g8H" for word in ("first", "second", "third", "fourth", "fifth")]
ENVIRONMENT = {
    name: f"{name.lower()}-9Z8y7X6w5V"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "SPECFORGE_API_KEY", "AWS_SECRET_ACCESS_KEY")
}
OPTIONS: dict[str, Any] = {
    "api_key": SECRETS[0],
    "headers": {"X-Mine": SECRETS[1]},
    "urls": [f"http://me:{SECRETS[2]}@127.0.0.1:1", f"http://h/?access_token={SECRETS[3]}&a=1"],
    "env": {"HF_TOKEN": SECRETS[4]},
}
# an engine with any options, and a tracker whose section has a key that its author forgot
PLUGIN = """
import os
from pydantic import SecretStr
from specforge_core import hookimpl
from specforge_core.config import Section
from specforge_core.defaults import specforge_target_engine as default
from specforge_core.errors import CaptureError

class Config(Section):
    api_key: str
    second: SecretStr
    project: str = "mine"

@hookimpl
def specforge_plugin_config():
    return Config

class Tracker:
    def __init__(self, run):
        self.path = run.output_dir / "told.txt"
        self.section = run.plugins["service"]
    def start(self, info):
        assert self.section.api_key.startswith("first")
        assert self.section.second.get_secret_value().startswith("second")
        self.path.write_text(repr(info))
    def log(self, step, metrics):
        pass
    def event(self, name, values):
        raise RuntimeError(f"no such service for {self.section.second.get_secret_value()!r}: "
                           f"https://me:{self.section.api_key}@host/?key={self.section.api_key}")
    def close(self):
        pass

@hookimpl
def specforge_tracker(run):
    return Tracker(run)

@hookimpl
def specforge_serve(target):
    raise CaptureError(f"no engine for {target.options}")

@hookimpl
def specforge_target_engine(target, device):
    if target.options.get("fail"):
        raise RuntimeError(f"a server said no to {target.options} and {os.environ['HF_TOKEN']}")
    if target.engine == "service":
        assert target.options["api_key"].startswith("first")
        plain = target.model_copy(update={"engine": "transformers", "options": {}})
        return default(target=plain, device=device)
"""

ASKED = (
    "regenerate.keep_unfinished=true",
    "regenerate.max_new_tokens=2",
    "eval.max_new_tokens=2",
    "eval.limit=1",
    "data.limit=1",
)


@pytest.fixture
def config(tmp_path: Path, toy_target: Path, env: FakeSite) -> Path:
    group = {"specforge.plugins": {"service": "specforge_service"}}
    env.dist("specforge-service", "1.0", group, module="specforge_service", source=PLUGIN)
    path = linear_run(tmp_path, toy_target)
    raw = yaml.safe_load(path.read_text())
    raw["target"] |= {"engine": "service", "options": OPTIONS}
    raw["plugins"] = {"service": {"api_key": SECRETS[0], "second": SECRETS[1]}}
    raw["train"] |= {"max_steps": 2}
    raw["eval"] = {"prompts": {"chat": str(tmp_path / "train.jsonl")}}
    raw["regenerate"] = {"prompts": [str(tmp_path / "train.jsonl")]}
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.slow
def test_a_runs_files_and_lines_hold_no_secret(config: Path, tmp_path: Path, env: FakeSite) -> None:
    site = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(env.path)}
    said = []
    elsewhere = ("target.options.fail=true", f"data.capture_dir={tmp_path / 'x'}")
    of_export = ("--draft", str(tmp_path / "run"), "--export", str(tmp_path / "run/export"))
    for arguments in (
        ["train", "-c", str(config), "--plan"],
        ["train", "-c", str(config)],
        ["train", "-c", str(config), "train.max_steps=3"],
        ["train", "-c", str(config), "train.max_steps=4", "strategy.layer=2"],
        ["train", "-c", str(config), "target.options.api_key=[", "train.max_steps=4"],
        ["train", "-c", str(config), f"plugins.service.api_key=[{SECRETS[0]}]"],
        ["train", "-c", str(config), f"plugins.service={{api_key: {SECRETS[0]}}}"],
        ["export", "--checkpoint", str(tmp_path / "run"), "-o", str(tmp_path / "run/export")],
        ["eval", "-c", str(config), "--draft", str(tmp_path / "run"), *ASKED],
        ["capture", "-c", str(config), f"data.capture_dir={tmp_path / 'run/capture'}"],
        ["verify", str(tmp_path / "run/capture"), "-c", str(config), "--recapture", "1"],
        ["regenerate", "-c", str(config), "-o", str(tmp_path / "run/answers.jsonl"), *ASKED],
        ["data", "-c", str(config), "--show", "1"],
        ["watch", str(tmp_path / "run")],
        ["plot", str(tmp_path / "run"), "-o", str(tmp_path / "run/plot.png")],
        ["check", "service"],
        ["doctor", "-c", str(config), *of_export, *ASKED, "eval.limit=2"],
        ["--debug", "capture", "-c", str(config), *elsewhere],
        ["capture", "-c", str(config), *elsewhere],
    ):
        done = run(*arguments, env=site)
        said.append(done.stdout + done.stderr)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    written = {"state.json", "provenance.json", "metrics.jsonl", "told.txt", "report.json"}
    assert written | {"manifest.json", "answers.jsonl", "plot.png"} <= names, said
    assert "Traceback" in said[-2]
    assert all("a server said no to " in text for text in said[-2:])
    assert "no engine for {'api_key': '**" in (tmp_path / "run/doctor/report.json").read_text()
    assert "no such service" in said[1]
    assert "strategy.layer: -2 in it" in said[3]
    assert "Input should be a valid string" in said[5]
    assert "plugins.service.second: required" in said[6]
    for secret in (*SECRETS, *ENVIRONMENT.values()):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert [text for text in said if secret in text] == []
    state = json.loads(next(p for p in files if p.name == "state.json").read_text())
    assert state["config"]["target"]["options"] == {
        "api_key": MASK,
        "headers": MASK,
        "urls": [f"http://{MASK}@127.0.0.1:1", f"http://h/?access_token={MASK}&a=1"],
        "env": {"HF_TOKEN": MASK},
    }
    assert state["config"]["plugins"]["service"]["project"] == "mine"


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "API_KEY", "token", "hf_token", "accessToken", "password"),
        *("client_secret", "Authorization", "auth", "http-headers", "cookie", "key", "db.pwd"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert masked({"target": {"options": {name: "x"}}}) == {"target": {"options": {name: MASK}}}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 5, "tokenizer": "a", "keyboard": "b", "monkey": "c", "authority": "d"},
        {"device_map": "auto", "attn_implementation": "sdpa", "urls": ["http://h:1"]},
        {"api_key": None, "directory": "/dev/shm/hf-cache", "max_bytes": 1 << 30},
    ],
)
def test_other_options_are_shown(options: dict[str, Any]) -> None:
    assert masked({"target": {"options": options}}) == {"target": {"options": options}}


@pytest.mark.parametrize(
    "text", ["Bearer abc123", "sk-abcdefghijklmnop1234", "hf_aBcDeFgHiJkLmNoPqRs"]
)
def test_values_that_look_like_secrets_are_masked_whatever_their_name(text: str) -> None:
    found = masked({"plugins": {"x": {"extra": [f"say {text} now"]}}})
    assert found["plugins"]["x"]["extra"] == [f"say {MASK} now"]


@pytest.mark.parametrize(
    "error",
    [
        RunError("no answer from http://me:sk-verysecret@host:1/v1"),
        ValueError("https://host/?api_key=sk-verysecret&x=1 is down"),
        ValueError("Invalid header value b'Bearer sk-verysecret'"),
        OSError(28, "No space left on device", "/x?token=sk-verysecret"),
        MemoryError("Basic bWU6verysecret=="),
        ValueError("key hf_sk-verysecretabcdefg refused"),
    ],
)
def test_what_is_said_of_an_error_holds_no_secret(error: Exception) -> None:
    message, _ = describe(error)
    assert "verysecret" not in message
    assert MASK in message


def test_keys_of_the_environment_are_in_no_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless they are files that are there, whose names a message needs."""
    for name in ("SPECFORGE_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"verysecret of {name}")
    monkeypatch.setenv("SSL_KEY", str(tmp_path))
    monkeypatch.setenv("BASE64_SECRET", "/bc123de")
    monkeypatch.setenv("LONG_KEY", "k" * 300)
    text = f"verysecret of HF_TOKEN, verysecret of AWS_SECRET_ACCESS_KEY: {tmp_path} /bc123de"
    assert describe(RunError(text))[0] == f"{MASK}, {MASK}: {tmp_path} {MASK}"
    assert "kkk" not in describe(RunError(f"key {'k' * 300}"))[0]


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\ud800", "\x07\x9b", "\u202eabc"])
def test_what_a_terminal_would_obey_is_shown_escaped(text: str) -> None:
    message, _ = describe(RunError(f"HTTP 400: {text}\nnext line"))
    assert message.isascii()
    assert message.endswith("\nnext line")
    assert all(char.isprintable() or char == "\n" for char in message)


def test_plain_words_of_an_error_are_kept() -> None:
    text = "a basic instruction: bearers of token 5 at http://127.0.0.1:8000/v1?a=b, key 3"
    assert describe(RunError(text)) == (text, 1)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_too_little_memory_says_what_takes_less(error: Exception) -> None:
    message, status = describe(error)
    assert message.startswith("there is too little memory. Try less at a time: train.batch_size=1")
    assert status == 1


def test_an_error_whose_text_cannot_be_made_is_told() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert describe(Bad())[0].startswith("Bad: (its text cannot be made: RuntimeError)")


def test_the_target_and_the_strategy_are_shown_as_they_are() -> None:
    config = {
        "target": {"path": "hf-internal-testing/tiny-random-LlamaForCausalLM"},
        "strategy": {"name": "a", "mask_token": "<mask>", "key": 5},
    }
    assert masked(config) == config


def test_secret_values_are_found_to_be_taken_out_of_messages() -> None:
    found = secret_values({"env": {"HF_TOKEN": "a", "HOME": "b"}, "args": {"api_key": "c", "n": 1}})
    assert sorted(found) == ["a", "c"]


@pytest.mark.parametrize(
    "override",
    ["target.options.api_key sk", "target.options.api_key=[sk", "target.path.token=sk"],
)
def test_an_override_that_is_wrong_is_shown_without_its_secret(override: str) -> None:
    with pytest.raises(ConfigError) as found:
        apply_override({"target": {"path": "x"}}, override)
    assert "sk" not in str(found.value)
    assert MASK in str(found.value)


@pytest.mark.parametrize("name", ["strategy.mask_token_id", "target.options.eos_token_ids"])
def test_a_token_of_a_vocabulary_is_no_secret(name: str) -> None:
    assert in_error("None", name) == "None"
    assert in_error("None", name.replace("token", "access_token")) == MASK
    assert in_error("None", "target.options.token_id") == MASK
