"""What the train step says its drafts would get accepted, and what the proposer gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..evaluate.decode import pick
from ..types import GenerateOptions, Prompt, Proposer, Sample, Sampling, Simulator, TargetCapture
from .case import Case

METRIC = "acceptance_length"
ANSWER = 24  # tokens of an answer
STEPS = 300  # in which a draft has to learn a few answers by heart, for the most part


def own_answers(case: Case) -> list[TargetCapture]:
    """Return captures of answers that the target wrote itself, greedily.

    Their states are what is left of them in bfloat16, so that what an adapter stores in that is
    what the proposer sees.
    """
    prompts = [_answered(c, c.input_ids[: int(c.loss_mask.argmax())], ()) for c in case.captures]
    engine = case.job.engine()
    try:
        options = GenerateOptions(max_new_tokens=ANSWER)
        answers = {a.index: a.tokens for a in engine.generate(prompts, options)}
        texts = [
            _answered(capture, prompt.input_ids, answers[prompt.index])
            for capture, prompt in zip(case.captures, prompts, strict=True)
        ]
        found = sorted(engine.capture(texts, case.job.adapter.spec), key=lambda c: c.index)
    finally:
        engine.close()
    return [
        replace(
            capture,
            hidden_states={i: _rounded(states) for i, states in capture.hidden_states.items()},
            final=None if capture.final is None else _rounded(capture.final),
        )
        for capture in found
    ]


def learn(case: Case, samples: Sequence[Sample], rate: float) -> bool:
    """Train the draft until a third of what it drafts is accepted; False where it never is.

    By what the step says: a draft of which nothing or all is accepted would hide a difference.
    """
    chosen = [p for p in case.draft.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate)
    enough = 1 + draft_tokens(case) / 3
    case.draft.model.train()
    for _ in range(STEPS):
        output = case.step(samples)
        if float(output.metrics[METRIC].num) >= enough * float(output.metrics[METRIC].den):
            return True
        optimizer.zero_grad()
        torch.autograd.backward(output.loss_sum / output.weight)
        optimizer.step()
    return False


def draft_tokens(case: Case) -> int:
    """Return the tokens of a draft that the step simulates."""
    step = case.job.strategy.train_step(case.job.run.strategy)
    return step.draft_tokens if isinstance(step, Simulator) else case.proposer().max_tokens


def simulated(case: Case, sample: Sample) -> tuple[float, int]:
    """Return the accepted tokens and the places of one sample, as the step counts them."""
    case.draft.model.eval()
    with torch.no_grad():
        found = case.step([sample]).metrics[METRIC]
    return float(found.num), int(found.den)


def drafted(proposer: Proposer, capture: TargetCapture, tokens: int) -> tuple[int, int] | None:
    """Draft up to `tokens` greedily behind each supervised token; count as a Simulator does.

    None where trees are drafted, which no step simulates.
    """
    ids, taught = capture.input_ids.tolist(), capture.loss_mask.bool().tolist()
    greedy = Sampling(temperature=0.0, generator=torch.Generator())
    emitted = places = 0
    for last in range(1, len(ids) - 1):
        if not (taught[last] and taught[last + 1]):
            continue
        proposer.start(pick(capture, list(range(last)), supervised=False))
        proposal = proposer.propose(ids[last], min(tokens, proposer.max_tokens), greedy)
        if proposal.parents is not None:
            return None
        places, emitted = places + 1, emitted + 1
        for token, place in zip(proposal.tokens.tolist(), range(last + 1, len(ids)), strict=False):
            if token != ids[place] or not taught[place]:
                break
            emitted += 1
    return emitted, places


def _answered(capture: TargetCapture, prompt: Tensor, answer: Sequence[int]) -> Prompt:
    ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])
    mask = torch.zeros_like(ids)
    mask[len(prompt) :] = 1
    return Prompt(index=capture.index, input_ids=ids, loss_mask=mask)


def _rounded(states: Tensor) -> Tensor:
    return states.bfloat16().to(states.dtype)
