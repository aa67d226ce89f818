"""The `target.options` section of `target.engine: openai`, and what engines of servers share."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, model_validator

from specforge_core.config import Section, TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.text import cut

API_KEY_ENV = "SPECFORGE_API_KEY"

Options = TypeVar("Options", bound="Addresses")


# scheme, host of labels or an IPv6 address, port, path: as the libraries take them
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})"
ADDRESS = re.compile(
    rf"https?://(?:{LABEL}(?:\.{LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(?::0*([0-9]{{1,5}}))?"
    r"(?:/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?"
)


def _addresses(urls: tuple[str, ...]) -> tuple[str, ...]:
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and ("@" in parts.netloc or parts.query):
            raise ValueError(
                f"the address of {parts.hostname} holds a user, a password or a query, and configs "
                f"are stored and shown. Try: export {API_KEY_ENV}=KEY"
            )
        found = ADDRESS.fullmatch(url)
        if found is None or not 0 < int(found[1] or 1) <= 65535:
            shown = cut(url.rpartition("@")[2].partition("?")[0])  # no user, password or key
            raise ValueError(f"{shown!r} is no address of a server, such as http://127.0.0.1:30000")
    if len(set(urls)) != len(urls):
        raise ValueError("a url is listed twice")
    return tuple(url.rstrip("/").removesuffix("/v1") for url in urls)


Urls = Annotated[tuple[str, ...], AfterValidator(_addresses)]


class Addresses(Section):
    """Servers that run already; `url` may name a single one."""

    urls: Urls = Field((), description="Servers that run already: http://HOST:PORT.")

    @model_validator(mode="before")
    @classmethod
    def _one_url(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("url"), str) and "urls" not in raw:
            raw = {**raw, "urls": [raw["url"]]}
            del raw["url"]
        return raw


class OpenAIOptions(Addresses):
    """Which servers answer, and how long they are waited for."""

    urls: Urls = Field(min_length=1, description="Servers: http://HOST:PORT, with or without /v1.")
    timeout: float = Field(
        1800.0, gt=0, le=1e6, description="Seconds one answer may take, a server's queue included."
    )
    patience: float = Field(
        120.0, ge=0, le=1e6, description="Seconds to wait for a server when all are unreachable."
    )


def api_key() -> str | None:
    """Return the key that servers may ask for; it is in the environment alone.

    Raises ConfigError where it holds what a header cannot.
    """
    key = os.environ.get(API_KEY_ENV, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{API_KEY_ENV} is no key: it holds a line break, or what is no ASCII")
    return key or None


def read_options(target: TargetConfig, model: type[Options]) -> Options:
    """Validate `target.options`; ConfigError says which key is wrong, and what to write."""
    try:
        return model.model_validate(target.options)
    except ValidationError as exc:
        lines = []
        for error in exc.errors(include_url=False):
            where = ".".join(("target.options", *map(str, error["loc"])))
            message = error["msg"].removeprefix("Value error, ")
            if error["type"] == "extra_forbidden":
                known = ", ".join(("url", *model.model_fields))
                message = (
                    f"unknown key (known: {known}). Options go with an engine; all at once are "
                    "replaced by 'target.options={urls: [http://HOST:PORT]}'"
                )
                if error["loc"][-1] == "api_key":
                    message = f"is read from the environment only. Try: export {API_KEY_ENV}=KEY"
            elif error["type"] == "missing":
                message = "required, and missing. Try: target.options.urls=[http://HOST:PORT]"
            lines.append(f"{where}: {message}")
        listing = "\n  ".join(lines)
        raise ConfigError(
            f"the options of target.engine={target.engine} are wrong:\n  {listing}"
        ) from exc
