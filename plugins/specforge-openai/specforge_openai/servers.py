"""Answers from running servers: a fixed number of conversations in flight over all of them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..config import RunConfig, TargetConfig
from ..errors import DataError, RunError
from ..http_json import Refused, ServerDown
from ..progress import console
from ..target.engine import load_target_info
from .completions import Client, Completion, check_server
from .respond import Chat, Rules, Task, end_tokens

TRIES = 3  # of one request, on servers that are up
PAUSE_SECONDS = 0.5  # before the second try, and twice that before the third
GATHER_SECONDS = 0.1  # between two groups of finished chats: each is one write to the disk


@dataclass(slots=True, eq=False)
class Server:
    """One server and what is known of it."""

    client: Client
    model: str
    outstanding: int = 0  # requests
    retired: str | None = None  # why, if it is


class Servers:
    """An Answerer over HTTP.  Raises ConfigError, RunError when no server can be used.

    A request goes to the server with the fewest outstanding.  A server that fails, and does not
    answer when asked what it serves, gets no more work; its requests go to the others.
    """

    def __init__(self, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.run = run
        self.tokenizer = tokenizer
        self.num_tokens = 0
        self._started: float | None = None
        self._lock = threading.Lock()
        self._servers: list[Server] = []
        info = load_target_info(run.target)
        limits = [info.config.get("max_position_embeddings")]
        for url in run.regenerate.urls:
            client = Client(url)
            try:
                served = check_server(client, run.target, tokenizer)
            except ServerDown as exc:
                self._servers.append(Server(client, "", retired=str(exc)))
                continue
            self._servers.append(Server(client, served.id))
            limits.append(served.positions)
        if all(server.retired for server in self._servers):
            raise self._none_left()
        for server in self._servers:
            if server.retired is not None:
                text = f"{server.client.url} does not answer ({server.retired}); going on without"
                console.print(text, markup=False)
        positions = min((limit for limit in limits if limit), default=None)
        self.rules = Rules(run, tokenizer, info.vocab_size, positions)
        self.ends = end_tokens(_named_ends(run.target, info.config), tokenizer)
        special = {token for token in self.ends if token in tokenizer.all_special_ids}
        self._end_texts = tuple(str(tokenizer.decode([token])) for token in sorted(special))

    @property
    def seconds(self) -> float:
        """Since the first question."""
        return time.perf_counter() - self._started if self._started is not None else 0.0

    def answer(self, tasks: Sequence[Task], done: Set[str]) -> Iterator[list[Chat]]:
        """Yield chats as they are finished; what finishes meanwhile is in the next list."""
        self._started = self._started or time.perf_counter()
        waiting = deque(task for task in tasks if task.id not in done)
        left = len(waiting)
        finished: SimpleQueue[Chat | BaseException] = SimpleQueue()
        for _ in range(min(left, self.run.regenerate.batch_size)):
            # daemons: an interrupted run does not wait for answers that nobody reads
            threading.Thread(target=self._work, args=(waiting, finished), daemon=True).start()
        try:
            while left:
                found = [finished.get()]
                time.sleep(GATHER_SECONDS)
                while not finished.empty():
                    found.append(finished.get())
                chats = [chat for chat in found if isinstance(chat, Chat)]
                left -= len(chats)
                if chats:
                    yield chats
                for error in found:
                    if isinstance(error, BaseException):
                        raise error
        finally:
            waiting.clear()

    def _work(self, waiting: deque[Task], finished: SimpleQueue[Chat | BaseException]) -> None:
        """Answer conversations until none is waiting, or one fails."""
        try:
            while True:
                try:
                    task = waiting.popleft()
                except IndexError:
                    return
                finished.put(self._converse(Chat(task)))
        except BaseException as exc:
            finished.put(exc)

    def _converse(self, chat: Chat) -> Chat:
        """Answer the turns of one conversation, up to the first answer that is not kept."""
        for turn, asked in enumerate(chat.task.turns):
            messages = [*chat.messages, *asked]
            with self._lock:  # a tokenizer is not made for several threads
                prompt = self.rules.prompt(chat, messages)
            if prompt is None:
                break
            try:
                answer = self._complete(self._body(prompt, f"{chat.task.id}/{turn}"))
            except Refused as exc:
                if self.run.data.on_error == "raise":
                    raise DataError(
                        f"{chat.task.where}: the server refuses the prompt of {len(prompt)} tokens "
                        f"({exc}). Shorten it (data.max_length), or set data.on_error=skip"
                    ) from exc
                chat.dropped = "refused by the server"
                break
            stopped = answer.finish_reason == "stop"
            self.rules.keep(chat, messages, self._cut(answer.text, stopped), stopped)
            if chat.dropped is not None:
                break
        return chat

    def _body(self, prompt: list[int], name: str) -> dict[str, Any]:
        """Return a request that leaves nothing to a server's or the model's own defaults."""
        settings = self.run.regenerate
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": self.rules.room(len(prompt)),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": self.ends,
            "skip_special_tokens": False,  # in the middle they are part of what was generated
        }
        if settings.temperature > 0:
            digest = hashlib.sha256(f"{settings.seed}/{name}".encode()).hexdigest()
            body["seed"] = int(digest[:7], 16)
        return body

    def _cut(self, text: str, stopped: bool) -> str:
        """Take off the end-of-turn token: some servers leave one whose id is 0."""
        if stopped:
            for end in self._end_texts:
                if text.endswith(end):
                    return text.removesuffix(end)
        return text

    def _complete(self, body: dict[str, Any]) -> Completion:
        """Ask one server after the other.  Raises Refused, and RunError when none is left."""
        tries = 0
        while True:
            server = self._acquire()
            try:
                answer = server.client.complete({"model": server.model, **body})
            except ServerDown as exc:
                if self._is_up(server, str(exc)):
                    tries += 1
                    if tries == TRIES:
                        raise Refused(f"{TRIES} tries, the last one: {exc}") from exc
                    time.sleep(PAUSE_SECONDS * tries)
                continue
            finally:
                with self._lock:
                    server.outstanding -= 1
            with self._lock:
                self.num_tokens += answer.num_tokens
            return answer

    def _acquire(self) -> Server:
        with self._lock:
            usable = [server for server in self._servers if server.retired is None]
            if not usable:
                raise self._none_left()
            server = min(usable, key=lambda server: server.outstanding)
            server.outstanding += 1
            return server

    def _is_up(self, server: Server, failure: str) -> bool:
        """Ask a server that failed for its model; retire it unless it answers."""
        if server.retired is None:
            try:
                server.client.served()
            except (ServerDown, Refused):
                with self._lock:
                    first, server.retired = server.retired is None, failure
                if first:
                    url = server.client.url
                    console.print(f"{url} failed ({failure}); going on without", markup=False)
        return server.retired is None

    def _none_left(self) -> RunError:
        listing = "\n  ".join(f"{s.client.url}: {s.retired}" for s in self._servers)
        return RunError(
            f"no server of regenerate.urls answers:\n  {listing}\nTry: start one that serves "
            f"{self.run.target.path}, then the same command, which goes on where it stopped"
        )


def _named_ends(target: TargetConfig, config: Any) -> int | list[int] | None:
    """Return the end-of-turn tokens that the model's files name."""
    try:
        generation = GenerationConfig.from_pretrained(
            target.path, revision=target.revision or "main"
        )
    except OSError:  # there is no such file
        found: int | list[int] | None = config.get("eos_token_id")
        return found
    ends: int | list[int] | None = generation.eos_token_id
    return ends
