"""One SGLang server, spoken to over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from specforge_openai.http_json import Refused, ServerDown, request_json
from specforge_openai.options import API_KEY_ENV, api_key
from specforge_sglang_capture import MIN_VERSION, parse_version
from specforge_sglang_capture.ask import Ask

from specforge_core.errors import CaptureError
from specforge_core.records import in_message

START = "python -m specforge_sglang_capture --model-path MODEL --port PORT"


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to one server.  Safe to use from several threads at once."""

    url: str
    timeout: float  # seconds
    key: str | None = field(default=None, repr=False)  # else the environment's

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path; ServerDown when the server does not answer."""
        return self._request(path, None)

    def prefill(self, input_ids: Sequence[int], ask: Ask) -> None:
        """Run a prompt; its states are handed over elsewhere, as `ask` says.

        No error shows the token by which they are let in.
        """
        body = {
            "input_ids": list(input_ids),
            "rid": str(ask),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "stream": False,
        }
        answer = self._request("/generate", body, (ask.token,))
        with understood(str(answer).replace(ask.place, "(place)"), self.url):
            cached = answer.get("meta_info", {}).get("cached_tokens")
        if cached:
            raise Refused(f"{cached} of its tokens came from the radix cache")

    def generate(self, input_ids: Sequence[int], sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one prompt."""
        body = {"input_ids": list(input_ids), "sampling_params": dict(sampling), "stream": False}
        return self._request("/generate", body)

    def _request(
        self, path: str, body: Mapping[str, Any] | None, secrets: Sequence[str] = ()
    ) -> dict[str, Any]:
        key = self.key or api_key()
        answer = request_json(
            self.url, path, body, timeout=self.timeout, api_key=key, secrets=secrets
        )
        if not isinstance(answer, dict):
            raise ServerDown("no answer of SGLang: it is no object of JSON")
        return answer


@contextmanager
def understood(answer: object, where: str) -> Iterator[None]:
    """Raise CaptureError where something in an answer is of another kind than SGLang's."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as exc:
        told = in_message(str(answer))[:200]  # no key is cut, and then not known
        raise CaptureError(
            f"the server at {where} gives an answer that is not SGLang's: {told!r}. "
            "Check target.options.urls"
        ) from exc


def check_server(client: Client) -> None:
    """Raise CaptureError when a server's version or flags cannot give correct states."""
    try:
        info = client.get("/server_info")
    except Refused as exc:
        raise CaptureError(
            f"{client.url} is no SGLang server that can be used ({exc}). Check target.options.urls"
            f" and {API_KEY_ENV} in the environment"
        ) from exc
    with understood(info, client.url):
        _check_info(client.url, info)


def _check_info(url: str, info: Mapping[str, Any]) -> None:
    found = str(info.get("version", "0"))
    if parse_version(found) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise CaptureError(
            f"the server at {url} is SGLang {found}, which is older than {wanted}. "
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
            f"the server at {url} would give wrong or no states; it needs: "
            f"{', '.join(wrong)}. Try: {START}, which adds what is needed"
        )


def _uses_graphs(info: Mapping[str, Any]) -> bool:
    return info.get("device") == "cuda" and info.get("disable_cuda_graph") is not True
