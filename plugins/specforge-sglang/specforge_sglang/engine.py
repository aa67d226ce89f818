"""The target engine: prompts out to SGLang servers, hidden states back from them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from specforge_openai.http_json import Refused, ServerDown
from specforge_openai.pool import Pool, Server, each
from specforge_sglang_capture import ENABLE_ENV, RECEIVERS_ENV
from specforge_sglang_capture.ask import HEAD, Ask, Head
from specforge_sglang_capture.frame import FrameError, unpack

from specforge_core.config import TargetConfig
from specforge_core.errors import CaptureError
from specforge_core.target.asked import check_layers, check_prompts
from specforge_core.target.info import load_target_info
from specforge_core.types import (
    CaptureSpec,
    Generated,
    GenerateOptions,
    Prompt,
    TargetCapture,
    TargetInfo,
)

from .answer import as_capture
from .budget import Budget, Outcome
from .child import ChildServer
from .client import START, Client, check_server
from .generate import as_answer, sampling_params
from .handoff import FileHandoff, Handoff
from .options import SGLangOptions, read_options
from .receiver import open_handoff, receiver_of

ARRIVAL_SECONDS = 60.0  # from a server's answer to the arrival of what it captured
FRAME_BYTES = 1 << 16  # of a frame besides its tokens
CHECK_SECONDS = 10.0  # one look at a server that was retired


class SGLangEngine:
    """A TargetEngine whose model runs in SGLang, here or elsewhere.  Captures are on the CPU."""

    answers_beside = True  # requests are independent, and answers take nothing from the hand-off

    def __init__(
        self,
        info: TargetInfo,
        options: SGLangOptions,
        servers: Sequence[Server[Client]],
        handoff: Handoff,
        child: ChildServer | None = None,
    ) -> None:
        self.info = info
        self._options, self._handoff, self._child = options, handoff, child
        self.pool = Pool(servers, self._check_again, options.patience)
        self._names = itertools.count()
        self._itemsize = 4  # bytes of one value, until a capture has shown the dtype

    @classmethod
    def load(cls, target: TargetConfig, device: torch.device) -> SGLangEngine:
        """Start a server, or find those that run; a first capture shows that they work.

        `device` is where the drafts are; states are on the CPU until the trainer wants them.
        """
        info = load_target_info(target)
        options = read_options(target)
        handoff = open_handoff(options)
        child = None
        try:
            if not options.urls:
                child = ChildServer(target, info, options, receiver=receiver_of(handoff))
                child.wait(child.client(5.0), options.start_timeout)
            clients = [Client(url, options.timeout) for url in options.urls]
            clients += [child.client(options.timeout)] if child else []
            engine = cls(info, options, [Server(client) for client in clients], handoff, child)
            engine._handshake()
        except BaseException:
            if child is not None:
                child.close()
            handoff.close()
            raise
        return engine

    def _handshake(self) -> None:
        """Capture a few tokens on every server; CaptureError says what is wrong with one."""
        tokens = torch.arange(3)
        prompt = Prompt(index=0, input_ids=tokens, loss_mask=torch.zeros_like(tokens))
        spec = CaptureSpec(layers=(0,), final="post_norm", fields={})
        down: dict[Server[Client], ServerDown] = {}
        for server in self.pool.servers:
            try:
                check_server(server.client)
                capture = self._ask(server, prompt, spec, first=True)
            except ServerDown as exc:
                if self._child is not None:
                    self._child.check_alive()
                down[server] = exc
                continue
            self._itemsize = capture.hidden_states[0].element_size()
        self.pool.begin(down, START, wait="patience" in self._options.model_fields_set)

    def supports(self, spec: CaptureSpec) -> bool:
        """Say yes: what a model cannot give is an error that names it."""
        return True

    def generate(self, prompts: Sequence[Prompt], options: GenerateOptions) -> Iterator[Generated]:
        """Yield answers as they come, `batch_size` of them in flight over all servers."""
        check_prompts(prompts, self.info.vocab_size)
        at_once = min(options.batch_size, self._options.max_requests)
        return each(prompts, partial(self._generate, options=options), at_once)

    def _generate(self, prompt: Prompt, options: GenerateOptions) -> Generated:
        """Have one prompt answered by some server, whichever fails meanwhile."""
        sampling = sampling_params(prompt, options, self.info)
        while True:
            server = self.pool.acquire(len(prompt.input_ids))
            found = None
            try:
                found = server.client.generate(prompt.input_ids.tolist(), sampling)
            except Refused as exc:
                return Generated(index=prompt.index, tokens=(), finished=False, refused=str(exc))
            except ServerDown as exc:
                if self._child is not None:
                    self._child.check_alive()
                self.pool.retire(server, str(exc))
                continue
            finally:
                self.pool.release(server, len(prompt.input_ids), found is not None)
            return as_answer(found, prompt, server.client.url)

    def capture(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> Iterator[TargetCapture]:
        """Yield one capture per prompt, in the order in which they arrive.

        At most `max_requests` prompts and `max_bytes` of states are on their way, those the
        caller has not taken included.  Raises CaptureError naming the prompt that went wrong.
        """
        self._check(prompts, spec)
        waiting = list(reversed(prompts))
        done: SimpleQueue[Outcome] = SimpleQueue()
        budget = Budget(self._limit())
        running = 0
        stop = threading.Event()
        try:
            while waiting or running:
                while waiting and running < self._options.max_requests:
                    size = self._size(waiting[-1], spec)
                    if not budget.fits(size):
                        break
                    budget.take(size)
                    running += 1
                    # a daemon: a request that hangs must not keep the process from ending
                    threading.Thread(
                        target=self._run, args=(waiting.pop(), spec, size, done, stop), daemon=True
                    ).start()
                outcome = done.get()
                running -= 1
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.capture is not None
                yield outcome.capture
                budget.give(outcome.size)
        finally:
            stop.set()

    def _check(self, prompts: Sequence[Prompt], spec: CaptureSpec) -> None:
        check_layers(spec.layers, self.info.num_layers)
        check_prompts(prompts, self.info.vocab_size)
        if not (spec.layers or spec.final != "none" or _head(spec)):
            raise CaptureError("the strategy asks for no states at all. Change its layers")

    def _limit(self) -> int:
        """Return how many bytes may be on their way: a small tmpfs allows fewer."""
        if isinstance(self._handoff, FileHandoff):
            return min(self._options.max_bytes, self._handoff.free_bytes() * 3 // 4)
        return self._options.max_bytes

    def _size(self, prompt: Prompt, spec: CaptureSpec, itemsize: int | None = None) -> int:
        count = len(spec.layers) + (spec.final != "none")
        width = self.info.hidden_size * (itemsize or self._itemsize)
        return len(prompt.input_ids) * (count * width + 20)

    def _run(
        self,
        prompt: Prompt,
        spec: CaptureSpec,
        size: int,
        done: SimpleQueue[Outcome],
        stop: threading.Event,
    ) -> None:
        """Have one prompt captured by some server, whichever fails meanwhile."""
        tokens = len(prompt.input_ids)
        try:
            while not stop.is_set():
                server = self.pool.acquire(tokens)
                served = False
                try:
                    capture = self._ask(server, prompt, spec)
                    served = True
                except ServerDown as exc:
                    if self._child is not None:
                        self._child.check_alive()
                    self.pool.retire(server, str(exc))
                    continue
                finally:
                    self.pool.release(server, tokens, served)
                done.put(Outcome(size, capture))
                return
        except BaseException as exc:
            done.put(Outcome(size, None, exc))

    def _ask(
        self, server: Server[Client], prompt: Prompt, spec: CaptureSpec, first: bool = False
    ) -> TargetCapture:
        """Have one prompt captured by one server.

        Raises ServerDown when another server may do better, CaptureError when none would.
        """
        name = f"{prompt.index}-{next(self._names)}"
        ask = Ask(
            name, self._handoff.way, self._handoff.place, spec.layers, spec.final, _head(spec)
        )
        # header and gaps, and values of 4 bytes, whatever dtype the first capture shows
        most = self._size(prompt, spec, itemsize=4) + FRAME_BYTES
        self._handoff.expect(name, most)
        where = f"prompt {prompt.index} (request {name} at {server.client.url})"
        try:
            server.client.prefill(prompt.input_ids.tolist(), ask)
            buffer = self._wait(server, name)
        except Refused as exc:
            self._handoff.forget(name)
            reason = str(exc).rstrip(".")
            raise CaptureError(f"{where} was refused: {reason}. Check data.max_length") from exc
        except BaseException:
            self._handoff.forget(name)
            raise
        if buffer is None:
            self._handoff.forget(name)
            if first:
                raise CaptureError(self._nothing_came(server))
            raise ServerDown(f"it answered request {name}, but its states did not come")
        try:
            frame = unpack(buffer)
        except FrameError as exc:
            raise CaptureError(f"{where} came back damaged: {exc}. Try again") from exc
        return as_capture(frame, ask, prompt, self.info, where)

    def _wait(self, server: Server[Client], name: str) -> Any:
        """Return the bytes of a frame; None when they do not come from a server that lives."""
        give_up = time.monotonic() + ARRIVAL_SECONDS
        while time.monotonic() < give_up and not self.pool.closed:
            if (buffer := self._handoff.take(name, min(1.0, ARRIVAL_SECONDS))) is not None:
                return buffer
            # it may have died between its answer and the hand-over
            replace(server.client, timeout=CHECK_SECONDS).get("/server_info")
        return None

    def _nothing_came(self, server: Server[Client]) -> str:
        remedy = (
            f"over http to {receiver_of(self._handoff)}: was it started with {RECEIVERS_ENV}="
            f"{receiver_of(self._handoff)}, and can that machine reach it? "
            "target.options.receiver_host says how this one is called"
            if self._handoff.way == "http"
            else f"as a file in {getattr(self._handoff, 'root', '')}. If it runs on another "
            "machine or in another container: target.options.handoff=http"
        )
        return (
            f"the server at {server.client.url} answers, but hands out no states: specforge's "
            f"plugin is not active there, or older than 0.2. Where it runs, try: pip install -U "
            f"specforge-sglang, then {START} (or {ENABLE_ENV}=1). States were expected {remedy}"
        )

    def _check_again(self, client: Client) -> None:
        if self._child is not None:
            self._child.check_alive()
        check_server(replace(client, timeout=CHECK_SECONDS))

    def close(self) -> None:
        """End the server that was started here, and delete what was not taken."""
        self.pool.closed = True
        if self._child is not None:
            self._child.close()
        self._handoff.close()


def _head(spec: CaptureSpec) -> Head:
    asked = {"next_tokens": spec.next_tokens, "logsumexp": spec.logsumexp}
    return tuple(name for name in HEAD if asked[name])
