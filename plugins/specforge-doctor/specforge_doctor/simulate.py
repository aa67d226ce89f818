"""The acceptance that the trainer simulates, on answers of the target itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specforge_core.batches.loader import to_device
from specforge_core.capture.samples import capture_in_order, to_host
from specforge_core.cpu import pick_dtype
from specforge_core.devices import pick_device
from specforge_core.draws import draws_of
from specforge_core.errors import CaptureError
from specforge_core.progress import track
from specforge_core.train.dist import world
from specforge_core.train.fsdp import cast_inputs
from specforge_core.types import Adapter, Draft, Prompt, Sample, StepContext, TargetEngine

from .inputs import Answers, Inputs, free_memory
from .stats import Measurement, Tally

SIMULATED = "trainer, simulated"
METRIC = "acceptance_length"


@torch.no_grad()
def simulate(inputs: Inputs, draft: Draft, answers: Answers) -> Measurement | None:
    """Take the answers the way of training: capture, adapter, checks, transform, collate, step.

    With `target.engine`, in the trainer's dtype, one sample a batch; the draft is moved in
    place.  None when the step has no metric `acceptance_length`.
    """
    run, strategy = inputs.run, inputs.strategy
    device = pick_device(run.train.device, "train.device")
    dtype = pick_dtype(run.train.compute_dtype, device)
    for module in (draft.model, draft.frozen):
        if module is not None:
            module.to(device, dtype).eval()
    cast_inputs(draft.model, dtype)
    step = strategy.train_step(run.strategy)
    tallies = [Tally(0, 0)] * len(answers)
    free_memory()
    engine = strategy.target_engine(run.target, pick_device(run.target.device, "target.device"))
    try:
        adapter = strategy.adapter(run.strategy, engine.info)
        collate = strategy.collate(run.strategy, adapter.spec, draft)
        with world(device) as alone, track("simulating", len(answers)) as tracker:
            for index, sample in _samples(inputs, engine, adapter, answers):
                context = StepContext(
                    step=0,
                    total_steps=1,
                    generator=torch.Generator().manual_seed(run.train.seed),
                    training=False,
                    mesh=alone.mesh,
                )
                metrics = step(draft, to_device(collate([sample]), device), context).metrics
                if METRIC not in metrics:
                    return None
                found = metrics[METRIC]
                tallies[index] = Tally(float(found.num), float(found.den))
                tracker.advance()
    finally:
        engine.close()
    return Measurement(SIMULATED, tuple(tallies))


def _samples(
    inputs: Inputs, engine: TargetEngine, adapter: Adapter, answers: Answers
) -> Iterator[tuple[int, Sample]]:
    """Yield what becomes of each answer, uncut; the strategy may skip one too short for it."""
    run, strategy, spec = inputs.run, inputs.strategy, adapter.spec
    prompts = []
    for index, (prompt, answer) in enumerate(zip(inputs.prompts, answers, strict=True)):
        ids = torch.tensor([*prompt.input_ids, *answer])
        mask = torch.zeros_like(ids)
        mask[len(prompt.input_ids) :] = 1
        prompts.append(Prompt(index=index, input_ids=ids, loss_mask=mask))
    longest = max(len(prompt.input_ids) for prompt in prompts)
    transform = strategy.transform(run.strategy, spec, longest)
    window = run.capture.window
    for index, sample in capture_in_order(strategy, engine, adapter, prompts, window):
        if sample is None:
            continue
        stored = to_host(index, sample)
        if problems := strategy.verify_capture(run.strategy, engine.info, spec, stored, None):
            raise CaptureError(
                f"the answer to {inputs.prompts[index].where} cannot be trained on: {problems[0]}. "
                f"Try: specforge check {strategy.name}"
            )
        kept = transform(sample, draws_of(run.train.seed, 0, index))
        if kept is not None:
            yield index, kept
