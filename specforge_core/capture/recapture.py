"""Capture one stored sample again, and compare its values.

A wrong layer, a missing norm or other weights give states of the right shape
that no training loss complains about, so the values themselves are compared:
with a tolerance, and with what the likely mistakes would have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from ..types import (
    Adapter,
    CaptureSpec,
    FinalState,
    Problem,
    Prompt,
    Sample,
    TargetCapture,
    TargetEngine,
)
from .layout import of_field

EXACT = ("input_ids", "loss_mask")
# whole numbers that are made from states, a most likely token say, move with their rounding: of an
# untrained target, whose tokens are all as likely, one in six does; of another layer nearly all
MOVED = 0.3
WIDENED = 1 << 20  # numbers that are compared at a time

OTHER: dict[FinalState, FinalState] = {"pre_norm": "post_norm", "post_norm": "pre_norm"}


@dataclass(frozen=True, slots=True)
class Fresh:
    """One prompt's states, the neighbours of what the spec asks for included."""

    base: TargetCapture  # its hidden_states hold the neighbouring layers too
    spec: CaptureSpec
    finals: dict[FinalState, Tensor | None]  # [T, H] each

    @classmethod
    def of(cls, engine: TargetEngine, spec: CaptureSpec, prompt: Prompt) -> Fresh:
        """Run the target on the prompt alone."""
        near = {i + step for i in spec.layers for step in (-1, 0, 1)}
        layers = tuple(sorted(i for i in near if -1 <= i < engine.info.num_layers))
        wide = replace(spec, layers=layers)
        if not engine.supports(wide):  # it replays what was stored, say
            wide = spec
        (base,) = engine.capture([prompt], wide)
        finals: dict[FinalState, Tensor | None] = {spec.final: base.final}
        if spec.final in OTHER:
            other = OTHER[spec.final]
            unlike = replace(spec, layers=(), final=other, next_tokens=False, logsumexp=False)
            if engine.supports(unlike):
                (again,) = engine.capture([prompt], unlike)
                finals[other] = again.final
        return cls(base, spec, finals)

    def capture(self, swap: tuple[int, int] | None = None, other: bool = False) -> TargetCapture:
        """Return what the spec asks for; with layer `swap[1]` in the place of `swap[0]`, if given.

        With `other`, the final state is normed where it should not be, or not where it should.
        """
        every = self.base.hidden_states
        states = {i: every[swap[1] if swap and swap[0] == i else i] for i in self.spec.layers}
        final = self.finals[OTHER[self.spec.final] if other else self.spec.final]
        return replace(self.base, hidden_states=states, final=final)

    def mistakes(self) -> Iterator[tuple[str, TargetCapture]]:
        """Yield the likely mistakes: what each would be called, and would have captured."""
        for layer in self.spec.layers:
            for wrong in (layer - 1, layer + 1):
                if wrong in self.base.hidden_states:
                    text = f"layer {layer} looks like the output of layer {wrong}"
                    yield text, self.capture(swap=(layer, wrong))
        if OTHER.get(self.spec.final) in self.finals:
            text = f"the final state looks like {OTHER[self.spec.final]}, not {self.spec.final}"
            yield text, self.capture(other=True)


def compare(fresh: Fresh, adapter: Adapter, stored: Sample) -> list[Problem]:
    """Return how a stored sample differs from what its prompt gives now."""
    expected = adapter(fresh.capture())
    if expected is None:
        return [Problem(where="sample", message="is stored, but the strategy now skips its prompt")]
    problems = [*_differing(stored, expected)]
    if problems:
        return problems
    floating = [name for name in stored if stored[name].is_floating_point()]
    if not floating:
        return []
    # compared where the target is: every mistake below is as large as the sample
    stored = {name: tensor.to(expected[name].device) for name, tensor in stored.items()}
    errors = _errors(stored, expected, floating)
    # noise adds to every layer's error, so only the right state can be the nearest one
    total = sum(e * e for e in errors)
    for text, capture in fresh.mistakes():
        sample = adapter(capture)
        if sample is not None and sum(e * e for e in _errors(stored, sample, floating)) < total:
            problems.append(
                Problem(where="values", message=f"{text}. Capture again with a corrected engine")
            )
    limit = _tolerance(stored, fresh, floating)
    if not problems and not median(errors) <= limit:
        problems.append(
            Problem(
                where="values",
                message=f"differ from a fresh capture by {median(errors):.1%} (at most "
                f"{limit:.1%} is rounding): another revision or dtype of the target? Capture again",
            )
        )
    return problems


def _differing(stored: Sample, expected: Sample) -> Iterator[Problem]:
    """Compare what must be equal: shapes, tokens and masks, nearly all other whole numbers."""
    if stored.keys() != expected.keys():
        have, want = ", ".join(sorted(stored)), ", ".join(sorted(expected))
        yield Problem(
            where="sample", message=f"has the fields {have}, a fresh capture {want}. Capture again"
        )
    for name in sorted(stored.keys() & expected.keys()):
        old, new = stored[name], expected[name]
        if old.shape != new.shape:
            detail = f"has shape {list(old.shape)}, a fresh capture {list(new.shape)}"
        elif old.is_floating_point():
            continue
        elif (moved := int((old != new.cpu()).sum())) > _may_move(name, old.numel()):
            detail = f"differs from a fresh capture at {moved} places"
        else:
            continue
        why = "another chat template, tokenizer, data or data.max_length?"
        yield of_field(name, f"{detail}: {why} Capture again, or correct the config")


def _may_move(name: str, count: int) -> float:
    """Return how many of a field's `count` whole numbers rounding may change."""
    return 0 if name in EXACT else 2 + MOVED * count


def _errors(stored: Sample, expected: Sample, names: list[str]) -> list[float]:
    """Return every token's (or whole field's) distance from `expected`, over its norm."""
    errors: list[float] = []
    for name in names:
        old, new = stored[name], expected[name]
        rows = (len(new), -1) if new.ndim > 1 else (1, -1)
        errors += torch.cat(list(_distances(old.reshape(rows), new.reshape(rows)))).tolist()
    return errors


def _distances(old: Tensor, new: Tensor) -> Iterator[Tensor]:
    """Yield the distances of rows [n, W] over the norms of the new ones, in float64.

    A few rows at a time, in memory that is used again: of a long sample's copies a CPU would take
    seconds, most of them for fresh pages.
    """
    most = max(1, WIDENED // max(1, new.shape[1]))
    wide, apart = (torch.empty_like(new[:most], dtype=torch.float64) for _ in range(2))
    for some, given in zip(torch.split(old, most), torch.split(new, most), strict=True):
        norm = wide[: len(given)].copy_(given).norm(dim=1)
        off = apart[: len(given)].copy_(some).sub_(wide[: len(given)]).norm(dim=1)
        yield off / norm.clamp_min(torch.finfo(torch.float32).tiny)


def _tolerance(stored: Sample, fresh: Fresh, names: list[str]) -> float:
    """Return the relative error that rounding explains.

    A batch of another shape moves bfloat16 states by 1 to 2 %, some layers on;
    neighbouring layers differ by 10 % and more.
    """
    states = [
        *fresh.base.hidden_states.values(),
        *(s for s in fresh.finals.values() if s is not None),
    ]
    dtypes = {stored[name].dtype for name in names} | {state.dtype for state in states}
    return max(1e-3, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
