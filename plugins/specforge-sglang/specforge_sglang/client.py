"""One SGLang server, spoken to over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from specforge_sglang_capture import MIN_VERSION, parse_version

from specforge_core.errors import CaptureError

START = "python -m specforge_sglang_capture --model-path MODEL --port PORT"


class ServerDown(Exception):
    """A server that cannot be used now; its work goes to another one."""


class Refused(Exception):
    """A server's answer that it cannot do what was asked, whichever server is asked."""


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to one server.  Safe to use from several threads at once."""

    url: str
    timeout: float  # seconds
    api_key: str | None = None

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path; ServerDown when the server does not answer."""
        return self._request("GET", path, None)

    def prefill(self, input_ids: Sequence[int], request_id: str) -> None:
        """Run a prompt; its states are handed over elsewhere, named in `request_id`."""
        body = {
            "input_ids": list(input_ids),
            "rid": request_id,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "stream": False,
        }
        answer = self._request("POST", "/generate", body)
        cached = answer.get("meta_info", {}).get("cached_tokens")
        if cached:
            raise Refused(f"{cached} of its tokens came from the radix cache")

    def generate(self, input_ids: Sequence[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        body = {"input_ids": list(input_ids), "sampling_params": dict(sampling), "stream": False}
        return self._request("POST", "/generate", body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        connection = kind(parts.netloc, timeout=self.timeout)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, text, headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise ServerDown(f"{type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()
        if 400 <= status < 500:
            raise Refused(f"HTTP {status}: {_reason(raw)}")
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            raise ServerDown(f"HTTP {status}: {_reason(raw)}")
        return answer


def _reason(raw: bytes) -> str:
    try:
        error = json.loads(raw)
        error = error.get("error", error) if isinstance(error, dict) else error
        error = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        error = raw.decode("utf-8", "replace")
    return " ".join(str(error).split())[:300] or "no reason given"


def check_server(client: Client) -> None:
    """Raise CaptureError when a server's version or flags cannot give correct states."""
    try:
        info = client.get("/server_info")
    except Refused as exc:
        raise CaptureError(
            f"{client.url} is no SGLang server that can be used ({exc}). Check target.options.urls"
            " and target.options.api_key"
        ) from exc
    found = str(info.get("version", "0"))
    if parse_version(found) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise CaptureError(
            f"the server at {client.url} is SGLang {found}, which is older than {wanted}. "
            f"Try: pip install 'sglang>={wanted}' where it runs"
        )
    wrong = [
        flag
        for flag, is_wrong in {
            "--disable-radix-cache": info.get("disable_radix_cache") is not True,
            "--chunked-prefill-size -1": (info.get("chunked_prefill_size") or -1) > 0,
            "--disable-cuda-graph": _uses_graphs(info),
            "--pp-size 1": (info.get("pp_size") or 1) > 1,
            "no --enable-dp-attention": bool(info.get("enable_dp_attention")),
            "no --enable-return-aux-hidden-states": bool(
                info.get("enable_return_aux_hidden_states")
            ),
        }.items()
        if is_wrong
    ]
    if wrong:
        raise CaptureError(
            f"the server at {client.url} would give wrong or no states; it needs: "
            f"{', '.join(wrong)}. Try: {START}, which adds what is needed"
        )


def _uses_graphs(info: Mapping[str, Any]) -> bool:
    return info.get("device") == "cuda" and info.get("disable_cuda_graph") is not True
