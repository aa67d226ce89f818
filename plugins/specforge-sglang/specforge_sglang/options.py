"""The `target.options` section when `target.engine` is sglang."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from specforge_openai.options import Addresses, read_options as read

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError

# flags that specforge sets itself: another value would give wrong states, or none
RESERVED = {
    "model_path",
    "revision",
    "dtype",
    "host",
    "port",
    "disable_radix_cache",
    "chunked_prefill_size",
    "disable_cuda_graph",
    "pp_size",
    "pipeline_parallel_size",
    "enable_dp_attention",
}
Flag = bool | int | float | str


class SGLangOptions(Addresses):
    """Which SGLang runs the target: one that is started here, or servers that run already."""

    python: str | None = Field(
        None, description="Interpreter of the environment that has SGLang; starts a server with it."
    )
    server_args: dict[str, Flag] = Field(
        default_factory=dict, description="More flags of the server: mem_fraction_static: 0.5, ..."
    )
    env: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict, description="More environment variables of the server."
    )
    handoff: Literal["auto", "files", "http"] = Field(
        "auto", description="files is for servers on this machine; auto looks at the urls."
    )
    directory: Path | None = Field(None, description="Where files are handed over: a tmpfs.")
    receiver_host: str | None = Field(
        None,
        description="Name or address under which other machines reach this one. If not set: "
        "127.0.0.1, which only this machine reaches.",
    )
    receiver_bind: str | None = Field(
        None, description="Address to listen on, if it is not receiver_host's: 0.0.0.0 is all."
    )
    receiver_port: int = Field(0, ge=0, le=65535, description="0 takes any free port.")
    max_bytes: int = Field(
        1 << 30, gt=0, le=1 << 50, description="States on their way, asked for or waiting."
    )
    max_requests: int = Field(64, gt=0, le=4096, description="Requests that run at once.")
    timeout: float = Field(300.0, gt=0, le=1e6, description="Seconds one request may take.")
    start_timeout: float = Field(
        600.0, gt=0, le=1e6, description="Seconds a server may take to start."
    )
    patience: float = Field(
        120.0, ge=0, le=1e6, description="Seconds to wait for a server when all are unreachable."
    )

    @field_validator("server_args")
    @classmethod
    def _not_reserved(cls, flags: dict[str, Flag]) -> dict[str, Flag]:
        named = {name.lstrip("-").replace("-", "_"): value for name, value in flags.items()}
        if taken := sorted(RESERVED & named.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set: specforge sets or forbids it")
        key = str(named.get("api_key", ""))
        if not (key.isascii() and key.isprintable()):
            raise ValueError("api_key is no key: it holds a line break, or what is no ASCII")
        return named

    @model_validator(mode="after")
    def _one_way(self) -> SGLangOptions:
        if self.urls and (self.python or self.server_args or self.env):
            raise ValueError("with urls no server is started: python, server_args, env do nothing")
        return self


def read_options(target: TargetConfig) -> SGLangOptions:
    """Validate `target.options`; ConfigError says which key is wrong, and what to write."""
    options = read(target, SGLangOptions)
    if options.urls or options.python:
        return options
    try:
        version("sglang")
    except PackageNotFoundError:
        raise ConfigError(
            "target.engine=sglang needs to know where SGLang is: it is not installed here. Try: "
            "target.options.python=/path/to/sglang-venv/bin/python, or "
            "target.options.urls=[http://HOST:PORT] of running servers"
        ) from None
    return options.model_copy(update={"python": sys.executable})
