"""`specforge doctor`: measure one draft in every way, and say why the numbers differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from specforge_core.config import RunConfig
from specforge_core.drafts.checkpoint import STATE, TrainState, check_strategy, find, read_state
from specforge_core.drafts.export import CONFIG, read_export, read_provenance
from specforge_core.drafts.identity import Made
from specforge_core.drafts.load import restore
from specforge_core.errors import ConfigError, PluginError, RunError
from specforge_core.evaluate.run import keep_earlier, make_directory
from specforge_core.files import refusing, write_file
from specforge_core.load import validate
from specforge_core.records import in_message
from specforge_core.strategy import Strategy
from specforge_core.target.info import load_target_info
from specforge_core.target.tokenizer import (
    template_fingerprint,
    template_options,
    tokenizer_fingerprint,
)
from specforge_core.types import Draft, Export, NotServed, Simulator

from .causes import TEMPLATE, Difference, differences, order
from .exported import explain, reloaded, serve, serve_copy
from .inputs import Answers, Inputs
from .reference import LOOP, open_reference
from .report import DoctorReport, Setup
from .simulate import simulate
from .verdict import Evidence, judge

REPORT = "doctor/report.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint, its export, and what the checkpoint is exported as today."""

    checkpoint: Path
    state: TrainState
    path: Path
    format: str
    found: Export
    fresh: Export


@dataclass(frozen=True, slots=True)
class Task:
    """What an engine is asked to do again."""

    draft_tokens: int
    answers: Answers
    eos: frozenset[int]


def diagnose(
    run: RunConfig, strategy: Strategy, draft: Path, export: Path, format: str | None = None
) -> DoctorReport:
    """Compare what the trainer, the reference loop and the engine accept; write the report.

    `draft` is a run or a checkpoint, `export` a directory made of it, in `format` if its
    provenance.json does not say.  Writes report.json under `run.output_dir`/doctor, and keeps
    one that is there under a number.
    Raises ConfigError and CheckpointError for what cannot be compared at all.
    """
    make_directory(run.output_dir / Path(REPORT).parent)
    inputs = Inputs.load(run, strategy, load_target_info(run.target))
    case = _read_case(inputs, draft, export, format)
    evidence = Evidence(_different(inputs, case), _notes(inputs, case))
    task = _in_reference(inputs, case, evidence)
    evidence.simulated = simulate(inputs, _draft(inputs, case), task.answers)
    if evidence.simulated is None:
        evidence.notes.append("not simulated: the strategy's step reports no acceptance_length")
    if not evidence.differs(evidence.exported):
        _in_engine(inputs, case, evidence, task)
    setup = Setup(
        strategy=strategy.name,
        target=run.target.path,
        checkpoint=str(case.checkpoint),
        step=case.state.step,
        export=str(case.path),
        format=case.format,
        dtype=run.eval.dtype,
        num_prompts=len(inputs.prompts),
        max_new_tokens=run.eval.max_new_tokens,
        draft_tokens=task.draft_tokens,
    )
    report = judge(setup, evidence)
    with refusing(RunError, "Make room there, then run the same command again"):
        keep_earlier(run.output_dir / REPORT)
        write_file(run.output_dir / REPORT, report.to_json().encode())
    return report


def _read_case(inputs: Inputs, draft: Path, export: Path, format: str | None) -> Case:
    """Read both sides, and export the checkpoint again as its own config says."""
    if (draft / CONFIG).exists() and not (draft / STATE).exists():
        raise ConfigError(
            f"--draft {str(draft)!r} is an exported draft, and the doctor compares one with the "
            "checkpoint it came from. Try: --draft OUTPUT_DIR --export " + str(draft)
        )
    checkpoint = find(draft)
    state = read_state(checkpoint)
    check_strategy(checkpoint, state.strategy, inputs.strategy.name)
    found = read_export(export)
    given = format or read_provenance(export).get("format")
    if not isinstance(given, str):
        raise ConfigError(
            f"{export} does not say in which format it was exported. Try: --format hf (or sglang, "
            "vllm ...)"
        )
    trained = _as_exported(inputs, state, export)
    restored = restore(trained, inputs.strategy, checkpoint, templates=False)
    fresh = inputs.strategy.export(trained.strategy, restored.draft, restored.target, given)
    config: dict[str, Any] = json.loads(json.dumps(fresh.config))  # as it would be read back
    return Case(checkpoint, state, export, given, found, replace(fresh, config=config))


def _as_exported(inputs: Inputs, state: TrainState, export: Path) -> RunConfig:
    """Return the run with the strategy section of the export, or else of the checkpoint.

    Nothing else of either is used: they may be anybody's.
    """
    config = read_provenance(export).get("config")
    stored = config.get("strategy") if isinstance(config, dict) else None
    ours = isinstance(stored, dict) and stored.get("name") == inputs.strategy.name
    section = stored if ours else state.config["strategy"]
    raw = {"target": {"path": inputs.run.target.path}, "strategy": section}
    strategy = validate(raw, f"the strategy section stored with {export}")[0].strategy
    return inputs.run.model_copy(update={"strategy": strategy})


def _different(inputs: Inputs, case: Case) -> tuple[Difference, ...]:
    """Return what the export has otherwise than a fresh one, and the training than today."""
    own = differences(case.found, case.fresh) + _templates(inputs, case)
    return tuple(sorted(own, key=lambda item: order(case.fresh).index(item.cause)))


def _templates(inputs: Inputs, case: Case) -> list[Difference]:
    """Compare how prompts are rendered now with how the draft's were."""
    kwargs = template_options(inputs.run.data)
    now = {
        "chat_template_fingerprint": template_fingerprint(inputs.tokenizer, kwargs),
        "tokenizer_fingerprint": tokenizer_fingerprint(inputs.tokenizer),
    }
    called = {
        "chat_template_fingerprint": "the chat template, or data.chat_template_kwargs,",
        "tokenizer_fingerprint": "the tokenizer",
    }
    origins = {"the checkpoint": case.state.identity}
    if made := Made.of_provenance(read_provenance(case.path), case.path):
        origins["the export"] = made.identity
    result = []
    for name, value in now.items():
        for origin, identity in origins.items():
            trained: str = getattr(identity, name)
            if trained != value:
                where = f"{called[name]} of {origin}"
                result.append(Difference(TEMPLATE, where, value[:12], trained[:12]))
                break
    return result


def _notes(inputs: Inputs, case: Case) -> list[str]:
    """Return what may surprise: another strategy section, an export of another step."""
    notes = []
    now = inputs.run.strategy.model_dump(mode="json")
    for name, trained in case.state.config["strategy"].items():
        if now.get(name) != trained:
            notes.append(f"strategy.{name} is {now.get(name)} here, and was {trained} in training")
    step = read_provenance(case.path).get("step")
    if step is not None and step != case.state.step:
        notes.append(f"the export is of step {step}, the checkpoint of step {case.state.step}")
    return notes


def _draft(inputs: Inputs, case: Case) -> Draft:
    return restore(inputs.run, inputs.strategy, case.checkpoint, templates=False).draft


def _in_reference(inputs: Inputs, case: Case, evidence: Evidence) -> Task:
    """Measure checkpoint and export in the loop; find the cause where they differ."""
    step = inputs.strategy.train_step(inputs.run.strategy)
    with open_reference(inputs) as reference:
        proposer = reference.proposer(_draft(inputs, case))
        simulated = step.draft_tokens if isinstance(step, Simulator) else proposer.max_tokens
        evidence.loop, answers = reference.loop(LOOP, proposer)
        if evidence.loop.value is None:
            raise ConfigError(
                "no answer has a second token, so nothing was drafted. Try: other eval.prompts, "
                "or eval.max_new_tokens=128"
            )
        evidence.everywhere = reference.everywhere(proposer, answers, simulated)
        task = Task(proposer.max_tokens, answers, reference.limits.eos)
        try:
            evidence.exported = reloaded(reference, case.found)
        except PluginError as exc:
            evidence.notes.append(in_message(f"the export was not read back: {exc}"))
            return task
        if evidence.differs(evidence.exported):
            evidence.explained = explain(
                partial(reloaded, reference),
                evidence.loop,
                case.found,
                case.fresh,
                evidence.different,
            )
    return task


def _in_engine(inputs: Inputs, case: Case, evidence: Evidence, task: Task) -> None:
    """Have the export served, where the engine can; find the cause where that differs."""
    found = serve(inputs, case.path, task.draft_tokens, task.answers, task.eos)
    if isinstance(found, NotServed):
        evidence.notes.append(f"no engine was measured: {found.reason}")
        return
    evidence.served = found
    evidence.notes.append(
        f"{found.engine}: {found.same} of {len(inputs.prompts)} answers are the reference's own"
    )
    if evidence.differs(found.measurement):
        assert evidence.loop is not None
        again = partial(
            serve_copy,
            inputs,
            draft_tokens=task.draft_tokens,
            answers=task.answers,
            eos=task.eos,
        )
        evidence.explained = explain(
            again, evidence.loop, case.found, case.fresh, evidence.different
        )
