"""What is accepted of an export: read back into the reference loop, and served by an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specforge_core.drafts.export import write_export
from specforge_core.errors import CheckpointError, SpecForgeError
from specforge_core.progress import console
from specforge_core.records import in_message
from specforge_core.types import Export, NotServed

from .causes import TEMPLATE, Difference, repair
from .inputs import Answers, Inputs, free_memory
from .reference import Reference
from .stats import Measurement, Tally, compare

EXPORT = "reference loop, export"
ENGINE = "engine"


def reloaded(reference: Reference, export: Export) -> Measurement:
    """Decode with an export's draft, loaded as `specforge eval --draft EXPORT` loads it.

    What the strategy refuses to load is a measurement too.  Raises PluginError where it
    loads no exports at all.
    """
    inputs = reference.inputs
    config = inputs.run.strategy
    draft = inputs.strategy.draft(config, inputs.target, None)
    try:
        inputs.strategy.load_export(config, draft, inputs.target, export)
    except CheckpointError as exc:
        return Measurement(EXPORT, (), refused=in_message(str(exc)))
    return reference.loop(EXPORT, reference.proposer(draft))[0]


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine did with an export."""

    engine: str
    measurement: Measurement
    same: int  # answers that are the target's own


def serve(
    inputs: Inputs, path: Path, draft_tokens: int, answers: Answers, eos: frozenset[int]
) -> Served | NotServed:
    """Have the engine answer the prompts with the export at `path`.

    An engine that fails on it is a measurement too.
    """
    engine = inputs.run.target.engine
    free_memory()
    try:
        server = inputs.strategy.serve(inputs.run.target, path, draft_tokens)
        if isinstance(server, NotServed):
            return server
        engine = server.name
        console.print(f"serving {path} with {engine}")
        prompts = [prompt.input_ids for prompt in inputs.prompts]
        try:
            found = server.answer(prompts, inputs.run.eval.max_new_tokens, eos)
        finally:
            server.close()
    except SpecForgeError as exc:  # a bad export may be why, so the walk goes on
        return Served(engine, Measurement(ENGINE, (), refused=in_message(str(exc))), 0)
    tallies = tuple(Tally(answer.emitted, answer.verifications) for answer in found)
    same = sum(a.tokens == tuple(b) for a, b in zip(found, answers, strict=True))
    return Served(engine, Measurement(ENGINE, tallies), same)


def serve_copy(
    inputs: Inputs, export: Export, draft_tokens: int, answers: Answers, eos: frozenset[int]
) -> Measurement:
    """Have the engine answer the prompts with an export that is nowhere yet."""
    with tempfile.TemporaryDirectory(prefix="specforge-doctor-") as directory:
        path = Path(directory) / "export"
        write_export(export, path, {"made_by": "specforge doctor"})
        found = serve(inputs, path, draft_tokens, answers, eos)
    assert isinstance(found, Served)  # it was before
    return found.measurement


def explain(
    measure: Callable[[Export], Measurement],
    reference: Measurement,
    found: Export,
    fresh: Export,
    different: Sequence[Difference],
) -> tuple[str, ...]:
    """Return the first cause whose repair brings the acceptance back.

    Where none does alone, the first ones that do together; nothing where all of them
    together do not.
    """
    # in the order of the differences; all here read the same template
    causes = list(dict.fromkeys(item.cause for item in different if item.cause != TEMPLATE))
    tried = [{cause} for cause in causes]
    tried += [set(causes[:end]) for end in range(2, len(causes) + 1)]
    for repaired in tried:
        console.print(f"repairing {', '.join(sorted(repaired))} in a copy")
        if not compare(reference, measure(repair(found, fresh, repaired))).differs:
            return tuple(cause for cause in causes if cause in repaired)
    return ()
