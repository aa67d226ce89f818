"""The target engine: prompts out to servers of completions, answers back from them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.asked import answer_room, check_prompts, max_positions
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import load_tokenizer
from specforge_core.types import (
    CaptureSpec,
    Generated,
    GenerateOptions,
    Prompt,
    TargetCapture,
    TargetInfo,
)

from .completions import Client, Completion, check_server
from .http_json import Refused, ServerDown
from .options import OpenAIOptions, read_options
from .pool import Pool, Server, each
from .sampling import plain_sampling, request_seed

TRIES = 3  # of one request, on servers that are up
TOKEN_CHARACTERS = 1024  # in one token; the longest of real vocabularies are runs of 512 spaces
PAUSE_SECONDS = 0.5  # before the second try, and twice that before the third


class OpenAIEngine:
    """A TargetEngine that only generates, over HTTP."""

    def __init__(
        self,
        target: TargetConfig,
        info: TargetInfo,
        tokenizer: PreTrainedTokenizerBase,
        options: OpenAIOptions,
    ) -> None:
        self.info = info
        self._target, self._tokenizer = target, tokenizer
        self._lock = threading.Lock()
        self._models: dict[str, str] = {}  # url -> the name that requests to it carry
        servers = [Server(Client(url, options.timeout)) for url in options.urls]
        self.pool = Pool(servers, self._check, options.patience)

    @classmethod
    def load(cls, target: TargetConfig) -> OpenAIEngine:
        """Ask every server what it serves; ConfigError unless that is the target.

        Those that do not answer are left out until they do; RunError when none does.
        """
        engine = cls(
            target,
            load_target_info(target),
            load_tokenizer(target),
            read_options(target, OpenAIOptions),
        )
        limits = [max_positions(engine.info)]
        down: dict[Server[Client], ServerDown] = {}
        for server in engine.pool.servers:
            try:
                limits.append(engine._look_at(server.client))
            except ServerDown as exc:
                down[server] = exc
        # the shortest context bounds all answers, whichever server gives one
        shortest = min((limit for limit in limits if limit), default=None)
        config = {**engine.info.config, "max_position_embeddings": shortest}
        engine.info = replace(engine.info, config=config)
        start = f"vllm serve {target.path}, or python -m sglang.launch_server --model-path "
        engine.pool.begin(down, start + target.path, wait="patience" in target.options)
        return engine

    def supports(self, spec: CaptureSpec) -> bool:
        """Say no: OpenAI's API hands out no states."""
        return False

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Raise CaptureError: OpenAI's API hands out no states."""
        raise CaptureError(
            "target.engine=openai only generates: OpenAI's API hands out no hidden states. "
            "Try: target.engine=transformers target.options={}, or target.engine=sglang "
            "(pip install specforge-sglang)"
        )

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Yield answers as they come, `batch_size` of them in flight over all servers.

        A prompt that no server answers comes back refused.  Raises RunError when no server is
        left, and none came back.
        """
        check_prompts(prompts, self.info.vocab_size)
        return each(prompts, partial(self._answer, options=options), options.batch_size)

    def _answer(self, prompt: Prompt, options: GenerateOptions) -> Generated:
        body = self._body(prompt, options)
        try:
            found = self._complete(body)
        except Refused as exc:
            return Generated(index=prompt.index, tokens=(), finished=False, refused=str(exc))
        if len(found.text) > TOKEN_CHARACTERS * (body["max_tokens"] + 1):
            raise CaptureError(
                f"a server answered {len(found.text):,} characters, and was asked for "
                f"{body['max_tokens']} tokens at most. Check target.options.urls"
            )
        stopped = found.finish_reason == "stop"
        return Generated(
            index=prompt.index,
            tokens=self._tokens(found, stopped, options.eos),
            finished=stopped,
            retokenized=found.tokens is None,
        )

    def _tokens(self, found: Completion, stopped: bool, eos: frozenset[int]) -> tuple[int, ...]:
        """Return an answer's tokens, the one that ended it included where it is known."""
        tokens = found.tokens
        if tokens is None:
            with self._lock:  # a tokenizer is not made for several threads
                ids = self._tokenizer(found.text, add_special_tokens=False, verbose=False)
            tokens = tuple(ids["input_ids"])
        if stopped and not (tokens and tokens[-1] in eos):
            if found.end in eos:
                tokens = (*tokens, found.end)
            elif len(eos) == 1:
                tokens = (*tokens, *eos)
        return tokens

    def _body(self, prompt: Prompt, options: GenerateOptions) -> dict[str, Any]:
        """Return a request that leaves nothing to a server's or the model's own defaults."""
        body: dict[str, Any] = {
            "prompt": prompt.input_ids.tolist(),
            "max_tokens": answer_room(self.info, len(prompt.input_ids), options),
            **plain_sampling(options),
            "skip_special_tokens": False,  # in the middle they are part of what was generated
            "return_token_ids": True,  # vLLM's; others pass over it
        }
        if options.temperature > 0:
            body["seed"] = request_seed(prompt, options)
        return body

    def _complete(self, body: dict[str, Any]) -> Completion:
        """Ask one server after the other.  Raises Refused, and RunError when none is left."""
        tries = 0
        while True:
            server = self.pool.acquire(1)
            served = False
            try:
                model = self._models[server.client.url]
                answer = server.client.complete({"model": model, **body})
                served = True
            except ServerDown as exc:
                if self._is_up(server, str(exc)):
                    tries += 1
                    if tries == TRIES:
                        raise Refused(f"{TRIES} tries, the last one: {exc}") from exc
                    time.sleep(PAUSE_SECONDS * tries)
                continue
            finally:
                self.pool.release(server, 1, served)
            return answer

    def _is_up(self, server: Server[Client], failure: str) -> bool:
        """Ask a server that failed for its model; retire it unless it answers."""
        if server.retired is None:
            try:
                server.client.served()
            except (ServerDown, Refused):
                self.pool.retire(server, failure)
        return server.retired is None

    def _look_at(self, client: Client) -> int | None:
        """Check what a server serves; return the tokens that it takes."""
        served = check_server(client, self._target, self._tokenizer)
        self._models[client.url] = served.id
        return served.positions

    def _check(self, client: Client) -> None:
        """Check a server that was out of service."""
        positions, limit = self._look_at(client), max_positions(self.info)
        if positions and (limit is None or positions < limit):
            raise ServerDown(
                f"it takes {positions} tokens, the run began with {limit or 'no limit'}"
            )

    def close(self) -> None:
        """Ask for no more."""
        self.pool.closed = True
