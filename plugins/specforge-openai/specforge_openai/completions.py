"""One server that speaks OpenAI's /v1/completions, and what it must serve to be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specforge_core.config import TargetConfig
from specforge_core.errors import ConfigError
from specforge_core.records import in_message
from specforge_core.target.tokenizer import PROBE

from .http_json import Refused, ServerDown, request_json
from .options import api_key

QUICK = 20.0  # seconds for an answer that needs no queue
FIRST = 300.0  # seconds for a first answer: a server that just started compiles its kernels


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    text: str
    finish_reason: str  # "stop" or "length"
    tokens: tuple[int, ...] | None  # where the server gives them
    end: int | None  # the token that ended it, where the server names one


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of its model."""

    id: str  # the name that requests carry
    names: tuple[str, ...]  # all that it goes by
    positions: int | None


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to one server.  Safe to use from several threads at once."""

    url: str
    timeout: float  # seconds for one answer: long ones, behind a server's queue

    def served(self) -> Served:
        """Return the server's first model."""
        answer = self._request("/v1/models", None, QUICK)
        try:
            card = answer["data"][0]
            names = {str(card[key]): None for key in ("id", "root") if card.get(key)}
            positions = card.get("max_model_len") or None
            if positions is not None and (positions is True or index(positions) < 1):
                raise ValueError("max_model_len is no number of tokens")
            return Served(str(card["id"]), tuple(names), positions)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as exc:
            told = in_message(str(answer))[:200]  # no key is cut, and then not known
            raise Refused(f"its /v1/models names no model: {told}") from exc

    def complete(self, body: Mapping[str, Any], timeout: float | None = None) -> Completion:
        """Return what continues `body["prompt"]`."""
        answer = self._request("/v1/completions", body, timeout or self.timeout)
        try:
            (choice,) = answer["choices"]
            text, reason = choice["text"], choice["finish_reason"]
            ids = choice.get("token_ids")  # vLLM's
            tokens = None if ids is None else tuple(map(index, ids))
            end = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's, SGLang's
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as exc:
            raise ServerDown(f"no completion: {in_message(str(answer))[:200]}") from exc
        if not isinstance(text, str):
            raise ServerDown(f"no completion, its text is {text!r:.40}")
        if reason not in ("stop", "length"):
            raise ServerDown(f"an answer that ended with {reason!r:.40}, not with stop or length")
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # half a surrogate pair, which JSON can spell
            raise ServerDown(f"an answer that is not valid Unicode ({exc})") from exc
        return Completion(text, reason, tokens, end if type(end) is int else None)

    def _request(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        return request_json(self.url, path, body, timeout=timeout, api_key=api_key())


def check_server(
    client: Client, target: TargetConfig, tokenizer: PreTrainedTokenizerBase
) -> Served:
    """Return what a server serves; ConfigError unless that is the target, ServerDown if it is down.

    By name, and by a text that goes there as token ids and must come back as text.
    """
    try:
        served = client.served()
    except Refused as exc:
        raise ConfigError(
            f"{client.url} does not speak OpenAI's API ({exc}). "
            "Try: target.options.urls=[http://HOST:PORT]"
        ) from exc
    if model_name(target.path) not in map(model_name, served.names):
        raise ConfigError(
            f"{client.url} serves {' = '.join(served.names)!r}, the target is {target.path!r}. Set "
            "target.path to the same, or if it is: start the server with "
            f"--served-model-name {model_name(target.path)}"
        )
    ids: list[int] = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    body = {"model": served.id, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True}
    try:
        text = client.complete(body, FIRST).text
    except Refused as exc:
        raise ConfigError(
            f"{client.url} refuses a prompt of token ids ({exc}), so it would not read what the "
            "target's chat template writes. Start a server whose /v1/completions takes them, "
            "or answer in this process: target.engine=transformers target.options={}"
        ) from exc
    if not _same_start(text, str(tokenizer.decode(ids))):
        raise ConfigError(
            f"{client.url} reads the token ids of {PROBE[:13]!r} as {in_message(text)[:40]!r}: it "
            f"does not echo prompts, or has another vocabulary than {target.path!r}. Serve the "
            "target"
        )
    return served


def _same_start(text: str, start: str) -> bool:
    """Compare without spaces, which versions of the libraries clean up unlike."""
    return "".join(text.split()).startswith("".join(start.split()))


def model_name(path: str) -> str:
    """Return the last part of a Hugging Face id or directory; of a cache's, its model."""
    found = Path(path)
    with suppress(OSError):  # a name that no file can have
        found = found.resolve() if found.is_dir() else found
    parts: Sequence[str] = found.parts or ("",)
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1]).lower()
