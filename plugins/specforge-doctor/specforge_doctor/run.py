"""`specforge doctor`: measure one draft in every way, and say why the numbers differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import RunConfig, validate
from ..data.chat import template_fingerprint, tokenizer_fingerprint
from ..drafts.export import CONFIG, PROVENANCE, read_export, write_file
from ..drafts.restore import restore
from ..errors import CheckpointError, ConfigError, PluginError
from ..evaluate.run import make_directory
from ..strategy import Strategy
from ..target.engine import load_target_info
from ..train.checkpoint import STATE, TrainState, check_strategy, find, read_state
from ..types import Draft, Export, NotServed, Simulator
from .bench import Answers, Bench
from .causes import ORDER, TEMPLATE, Difference, differences
from .exported import explain, reloaded, serve, serve_copy
from .reference import LOOP, open_reference
from .report import DoctorReport, Setup
from .simulate import simulate
from .verdict import Evidence, judge

REPORT = "doctor/report.json"


@dataclass(frozen=True, slots=True)
class Patient:
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
    provenance.json does not say.  Writes report.json under `run.output_dir`/doctor.
    Raises ConfigError and CheckpointError for what cannot be compared at all.
    """
    make_directory(run.output_dir / Path(REPORT).parent)
    bench = Bench.load(run, strategy, load_target_info(run.target))
    patient = _admit(bench, draft, export, format)
    evidence = Evidence(_different(bench, patient), _notes(bench, patient))
    task = _in_reference(bench, patient, evidence)
    evidence.simulated = simulate(bench, _draft(bench, patient), task.answers)
    if evidence.simulated is None:
        evidence.notes.append("not simulated: the strategy's step reports no acceptance_length")
    if not evidence.differs(evidence.exported):
        _in_engine(bench, patient, evidence, task)
    setup = Setup(
        strategy=strategy.name,
        target=run.target.path,
        checkpoint=str(patient.checkpoint),
        step=patient.state.step,
        export=str(patient.path),
        format=patient.format,
        dtype=run.eval.dtype,
        num_prompts=len(bench.prompts),
        max_new_tokens=run.eval.max_new_tokens,
        draft_tokens=task.draft_tokens,
    )
    report = judge(setup, evidence)
    write_file(run.output_dir / REPORT, report.to_json().encode())
    return report


def _admit(bench: Bench, draft: Path, export: Path, format: str | None) -> Patient:
    """Read both sides, and export the checkpoint again as its own config says."""
    if (draft / CONFIG).exists() and not (draft / STATE).exists():
        raise ConfigError(
            f"--draft {str(draft)!r} is an exported draft, and the doctor compares one with the "
            "checkpoint it came from. Try: --draft OUTPUT_DIR --export " + str(draft)
        )
    checkpoint = find(draft)
    state = read_state(checkpoint)
    check_strategy(checkpoint, state, bench.strategy.name)
    found = read_export(export)
    given = format or _provenance(export).get("format")
    if not isinstance(given, str):
        raise ConfigError(
            f"{export} does not say in which format it was exported. Try: --format hf (or sglang, "
            "vllm ...)"
        )
    trained, strategy = validate(state.config, f"the config stored in {checkpoint}")
    restored = restore(trained, strategy, checkpoint)
    fresh = strategy.export(trained.strategy, restored.draft, restored.target, given)
    config: dict[str, Any] = json.loads(json.dumps(fresh.config))  # as it would be read back
    return Patient(checkpoint, state, export, given, found, Export(config, fresh.weights))


def _provenance(export: Path) -> dict[str, Any]:
    """Return what an export says about itself; nothing for one that was made elsewhere."""
    path = export / PROVENANCE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as exc:
        raise CheckpointError(f"{path} is damaged: {exc}. Export again") from exc
    return found if isinstance(found, dict) else {}


def _different(bench: Bench, patient: Patient) -> tuple[Difference, ...]:
    """Return what the export has otherwise than a fresh one, and the training than today."""
    own = differences(patient.found, patient.fresh) + _templates(bench, patient)
    return tuple(sorted(own, key=lambda item: ORDER.index(item.cause)))


def _templates(bench: Bench, patient: Patient) -> list[Difference]:
    """Compare how prompts are rendered now with how the draft's were."""
    kwargs = bench.run.data.chat_template_kwargs
    now = {
        "chat_template_fingerprint": template_fingerprint(bench.tokenizer, kwargs),
        "tokenizer_fingerprint": tokenizer_fingerprint(bench.tokenizer),
    }
    called = {
        "chat_template_fingerprint": "the chat template, or data.chat_template_kwargs,",
        "tokenizer_fingerprint": "the tokenizer",
    }
    origins = {
        "the checkpoint": patient.state.identity,
        "the export": _provenance(patient.path).get("capture") or {},
    }
    result = []
    for name, value in now.items():
        for origin, identity in origins.items():
            trained = identity.get(name)
            if trained is not None and trained != value:
                where = f"{called[name]} of {origin}"
                result.append(Difference(TEMPLATE, where, value[:12], trained[:12]))
                break
    return result


def _notes(bench: Bench, patient: Patient) -> list[str]:
    """Return what may surprise: another strategy section, an export of another step."""
    notes = []
    now = bench.run.strategy.model_dump(mode="json")
    for name, trained in patient.state.config["strategy"].items():
        if now.get(name) != trained:
            notes.append(f"strategy.{name} is {now.get(name)} here, and was {trained} in training")
    step = _provenance(patient.path).get("step")
    if step is not None and step != patient.state.step:
        notes.append(f"the export is of step {step}, the checkpoint of step {patient.state.step}")
    return notes


def _draft(bench: Bench, patient: Patient) -> Draft:
    return restore(bench.run, bench.strategy, patient.checkpoint).draft


def _in_reference(bench: Bench, patient: Patient, evidence: Evidence) -> Task:
    """Measure checkpoint and export in the loop; find the cause where they differ."""
    step = bench.strategy.train_step(bench.run.strategy)
    with open_reference(bench) as reference:
        proposer = reference.proposer(_draft(bench, patient))
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
            evidence.exported = reloaded(reference, patient.found)
        except PluginError as exc:
            evidence.notes.append(f"the export was not read back: {exc}")
            return task
        if evidence.differs(evidence.exported):
            evidence.explained = explain(
                partial(reloaded, reference),
                evidence.loop,
                patient.found,
                patient.fresh,
                evidence.different,
            )
    return task


def _in_engine(bench: Bench, patient: Patient, evidence: Evidence, task: Task) -> None:
    """Have the export served, where the engine can; find the cause where that differs."""
    found = serve(bench, patient.path, task.draft_tokens, task.answers, task.eos)
    if isinstance(found, NotServed):
        evidence.notes.append(f"no engine was measured: {found.reason}")
        return
    evidence.served = found
    evidence.notes.append(
        f"{found.engine}: {found.same} of {len(bench.prompts)} answers are the reference's own"
    )
    if evidence.differs(found.measurement):
        assert evidence.loop is not None
        again = partial(
            serve_copy,
            bench,
            draft_tokens=task.draft_tokens,
            answers=task.answers,
            eos=task.eos,
        )
        evidence.explained = explain(
            again, evidence.loop, patient.found, patient.fresh, evidence.different
        )
