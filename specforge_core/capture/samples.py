"""From prompts to samples: the one path that offline and online training share."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import islice

import torch

from ..config import StrategyConfig
from ..errors import CaptureError
from ..returned import wrong_tensors
from ..strategy import Strategy
from ..target.asked import finite_advice
from ..types import Adapter, Problem, Prompt, Sample, TargetCapture, TargetEngine
from .layout import check_sample, non_finite
from .recapture import Fresh, compare

LOOK_AT_ONCE, LOOKS = 4, 8  # prompts captured together, and how often, for a first sample


def capture_in_order(
    strategy: Strategy,
    engine: TargetEngine,
    adapter: Adapter,
    prompts: Iterable[Prompt],
    window: int,
) -> Generator[tuple[int, Sample | None]]:
    """Yield each prompt's index and sample, in the prompts' order; None where it is skipped.

    The engine is given `window` prompts at a time, which it may answer in any
    order.  Samples stay on the device they were captured on.  Raises CaptureError
    when the engine leaves out, repeats, invents or changes a prompt.
    """
    source = iter(prompts)
    while asked := list(islice(source, window)):
        # a prompt may occur twice, where an epoch ends and the next one begins
        waiting = {prompt.index: prompt for prompt in asked}
        last = {prompt.index: place for place, prompt in enumerate(asked)}
        ready: dict[int, Sample | None] = {}
        place = 0
        for capture in engine.capture(list(waiting.values()), adapter.spec):
            prompt = waiting.pop(capture.index, None)
            if prompt is None or not _same(capture, prompt):
                raise CaptureError(
                    f"the target engine answered prompt {capture.index}, which it "
                    + (
                        "was not asked"
                        if prompt is None
                        else "ran with other tokens or another loss mask"
                    )
                    + ". Try: target.engine=transformers"
                )
            with strategy.guard("specforge_adapter"):
                sample = adapter(capture)
            if sample is not None:
                strategy.check("specforge_adapter", wrong_tensors(sample), value=adapter)
            ready[capture.index] = sample
            while place < len(asked) and (index := asked[place].index) in ready:
                yield index, ready.pop(index) if last[index] == place else ready[index]
                place += 1
        if waiting:
            raise CaptureError(
                f"the target engine gave no states for prompt {min(waiting)} and "
                f"{len(waiting) - 1} more. Try: target.engine=transformers"
            )


def _same(capture: TargetCapture, prompt: Prompt) -> bool:
    tokens = torch.equal(capture.input_ids, prompt.input_ids)
    return tokens and torch.equal(capture.loss_mask.bool(), prompt.loss_mask.bool())


def to_host(index: int, sample: Sample) -> Sample:
    """Return a sample on the CPU; CaptureError naming the prompt where it is not finite."""
    if bad := non_finite(sample):
        dtype = sample[bad[0]].dtype
        raise CaptureError(
            f"prompt {index}: field {bad[0]!r} is not finite as the strategy's adapter returned "
            f"it ({dtype}). {finite_advice(dtype)}"
        )
    return {name: tensor.detach().cpu() for name, tensor in sample.items()}


def check_first(
    strategy: Strategy,
    config: StrategyConfig,
    engine: TargetEngine,
    adapter: Adapter,
    prompts: Iterable[Prompt],
) -> None:
    """Check the first sample against the spec and a capture of its prompt alone.

    Before anything is stored or trained on.  Raises CaptureError when something is wrong.
    """
    source = iter(prompts)
    for _ in range(LOOKS):
        asked = {prompt.index: prompt for prompt in islice(source, LOOK_AT_ONCE)}
        captured = capture_in_order(strategy, engine, adapter, asked.values(), LOOK_AT_ONCE)
        # to the end, since an engine must not be called inside of its own iterator
        found = [(index, sample) for index, sample in captured if sample is not None]
        for index, sample in found[:1]:
            _check_alone(strategy, config, engine, adapter, asked[index], to_host(index, sample))
        if found or not asked:
            return


def _check_alone(
    strategy: Strategy,
    config: StrategyConfig,
    engine: TargetEngine,
    adapter: Adapter,
    prompt: Prompt,
    sample: Sample,
) -> None:
    spec = adapter.spec
    fresh = Fresh.of(engine, spec, prompt)
    # what every sample must be comes first: a strategy's own check may rely on it
    problems: list[Problem] = check_sample(spec, engine.info.vocab_size, sample)
    problems = problems or strategy.verify_capture(
        config, engine.info, spec, sample, fresh.capture()
    )
    problems = problems or compare(fresh, adapter, sample)
    what = f"the first sample (prompt {prompt.index})"
    refuse(problems, what, f"Try: specforge check {strategy.name}")


def refuse(problems: Iterable[Problem], what: str, advice: str) -> None:
    """Raise CaptureError that lists what is wrong with a sample, if anything is."""
    if found := [str(problem) for problem in problems]:
        listing, advice = told(found, advice)
        raise CaptureError(f"{what} cannot be trained on:{listing}\n{advice}")


def told(problems: Iterable[str], otherwise: str) -> tuple[str, str]:
    """Return problems, a line each, and what to type: what they say, once, or else `otherwise`.

    Advice on a capture would lead nowhere where the capture is sound and an option is not.
    """
    parts = [problem.partition(" Try: ") for problem in problems]
    advice = dict.fromkeys(f"Try: {own}" if own else otherwise for _, _, own in parts)
    return "".join(f"\n  {text.removesuffix('.')}" for text, _, _ in parts), "\n".join(advice)
