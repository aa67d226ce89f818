"""Answer the prompt sets, on a CPU several prompts at once."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import EvalConfig
from ..progress import track
from ..types import CaptureSpec, Draft, Proposer, Sampling
from .cached import share_abilities
from .decode import Limits, generate, generate_plain
from .lossless import first_difference, reference
from .report import PromptResult


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One tokenized prompt, up to the place where the target answers."""

    where: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Desk:
    """A target and a proposer that answer one prompt at a time."""

    model: Any
    proposer: Proposer

    def answer(
        self,
        prompt: EvalPrompt,
        spec: CaptureSpec,
        limits: Limits,
        options: EvalConfig,
        most: int,
        seed: int,
    ) -> PromptResult:
        """Answer with the draft, and with the target alone where `options.compare` asks for it."""
        draw = torch.Generator().manual_seed(seed)
        sampling = Sampling(temperature=options.temperature, generator=draw)
        ids = prompt.input_ids
        answer = generate(self.model, self.proposer, spec, ids, limits, sampling, most)
        if not options.compare:
            return PromptResult(prompt.where, answer, None, None)
        if options.temperature:
            alone = generate_plain(self.model, ids, limits, sampling)
            return PromptResult(prompt.where, answer, alone, None)
        # also the baseline of the speed-up: as fast as generate_plain, and run anyway
        alone = reference(self.model, ids, limits)
        difference = first_difference(self.model, ids, answer.tokens, alone.tokens)
        return PromptResult(prompt.where, answer, alone, difference)


class Stopped(Exception):
    """Another prompt failed, or the user ended the command."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Desks side by side, and what they are asked to do."""

    desks: tuple[Desk, ...]
    spec: CaptureSpec
    limits: Limits
    max_draft_tokens: int
    options: EvalConfig
    quiet: bool = False  # show no progress

    def run_sets(self, sets: Mapping[str, list[EvalPrompt]]) -> dict[str, list[PromptResult]]:
        """Answer every prompt; every desk first answers one for warm-up that does not count."""
        jobs = [(name, i) for name, prompts in sets.items() for i in range(len(prompts))]
        first = next(prompts[0] for prompts in sets.values())
        found: dict[tuple[str, int], PromptResult] = {}
        free: queue.SimpleQueue[Desk] = queue.SimpleQueue()
        for desk in self.desks:
            self._answer(desk, first, 0, Limits(2, self.limits.eos))
            free.put(desk)

        def work(name: str, place: int) -> PromptResult:
            desk = free.get()
            try:
                # seeded by place: a set's answers do not depend on the other sets
                seed = self.options.seed * 1_000_003 + place
                return self._answer(desk, sets[name][place], seed, self.limits)
            finally:
                free.put(desk)

        with track("eval", len(jobs), quiet=self.quiet) as tracker, self._workers() as pool:
            running = {pool.submit(work, *job): job for job in jobs}
            for future in as_completed(running):
                found[running[future]] = future.result()
                tracker.advance(note=running[future][0])
        return {name: [found[name, i] for i in range(len(p))] for name, p in sets.items()}

    def _answer(self, desk: Desk, prompt: EvalPrompt, seed: int, limits: Limits) -> PromptResult:
        return desk.answer(prompt, self.spec, limits, self.options, self.max_draft_tokens, seed)

    @contextmanager
    def _workers(self) -> Iterator[ThreadPoolExecutor]:
        """Give threads that share the CPU threads of one; whatever ends the block ends them."""
        threads = torch.get_num_threads()
        share = max(1, threads // len(self.desks))
        stop = threading.Event()

        def check(*_: object) -> None:
            if stop.is_set():
                raise Stopped

        hooks = [desk.model.register_forward_pre_hook(check) for desk in self.desks]
        pool = ThreadPoolExecutor(
            len(self.desks), "eval", initializer=torch.set_num_threads, initargs=(share,)
        )
        try:
            yield pool
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            for hook in hooks:
                hook.remove()
            torch.set_num_threads(threads)  # MKL knows one number for all threads


def open_desks(
    model: Any, draft: Draft, make: Callable[[Draft], Proposer], prompts: int
) -> tuple[Desk, ...]:
    """Return one desk, or on a CPU as many as it has threads; they share all weights.

    A product with a handful of rows gains little from a second thread, and waits long for it
    on a busy machine; a second prompt beside the first gains all of it.
    """
    count = min(torch.get_num_threads(), prompts) if model.device.type == "cpu" else 1
    desks = [Desk(model, make(draft))]
    modules = [m for m in (model, draft.model, draft.frozen) if m is not None]
    for _ in range(count - 1):
        # hooks, caches and generation settings are each copy's own
        twin, copied = copy.deepcopy((model, draft), _shared(modules))
        share_abilities(model, twin)
        desks.append(Desk(twin, make(copied)))
    return tuple(desks)


def _shared(modules: list[nn.Module]) -> dict[int, Any]:
    tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
    return {id(tensor): tensor for tensor in tensors}
