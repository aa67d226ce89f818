"""Options are checked before anything starts, and every error names its key."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from specforge_openai.options import OpenAIOptions
from specforge_sglang.options import SGLangOptions, read_options

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.section import Section


def read(**options: Any) -> Any:
    return read_options(TargetConfig(path="t", engine="sglang", options=options))


@pytest.mark.parametrize("options", [SGLangOptions, OpenAIOptions])
def test_messages_advise_options_that_are_there(options: type[Section]) -> None:
    package = Path(inspect.getfile(options)).parent
    text = "".join(path.read_text() for path in package.glob("*.py"))
    found = set(re.findall(r"target\.options\.([a-z_]+)", text))
    assert "urls" in found <= set(options.model_fields)


def test_one_url_or_several() -> None:
    assert read(url="http://a:1/").urls == ("http://a:1",)
    assert read(urls=["http://a:1", "https://b"]).urls == ("http://a:1", "https://b")


def test_flags_may_be_written_as_on_the_command_line() -> None:
    flags = read(python="p", server_args={"--tp-size": 2, "mem_fraction_static": 0.5}).server_args
    assert flags == {"tp_size": 2, "mem_fraction_static": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pithon": "x"}, r"target\.options\.pithon: unknown key \(known: url, urls, python"),
        (
            {"url": "host:30000"},
            r"target\.options\.urls: 'host:30000' is no address of a server, such as http://",
        ),
        ({"url": "http://a", "api_key": "k"}, "Try: export SPECFORGE_API_KEY=KEY"),
        ({"urls": ["http://a", "http://a"]}, "a url is listed twice"),
        ({"url": "http://a", "python": "p"}, "with urls no server is started"),
        ({"python": "p", "max_bytes": 0}, r"target\.options\.max_bytes: .*greater than 0"),
        ({"python": "p", "server_args": {"chunked-prefill-size": 512}}, "chunked_prefill_size"),
        ({"python": "p", "server_args": {"disable_radix_cache": False}}, "disable_radix_cache"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**options)


def test_without_sglang_here_one_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"target\.options\.python=.*target\.options\.urls="):
        read()


def test_sglang_in_this_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "sglang-0.5.14.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.14\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read().python == sys.executable
