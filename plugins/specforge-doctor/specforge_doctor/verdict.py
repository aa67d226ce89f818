"""From what was measured to one sentence, and the next command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .causes import TEMPLATE, UNNAMED, Difference
from .exported import Served
from .report import DoctorReport, Setup, Verdict
from .stats import TOLERANCE, Comparison, Measurement, compare

LOOK_AT = (
    "the engine's own flags (target.options), its dtype and attention backend, the number of "
    "drafted tokens, the revision of the target, and eval.dtype"
)


@dataclass(slots=True)
class Evidence:
    """What is known so far; filled as it is measured."""

    different: tuple[Difference, ...]  # the export from a fresh one, and the template's
    notes: list[str]
    loop: Measurement | None = None
    everywhere: Measurement | None = None
    simulated: Measurement | None = None
    exported: Measurement | None = None
    served: Served | None = None
    explained: tuple[str, ...] = ()  # the causes whose repair helps

    def comparisons(self) -> tuple[Comparison, ...]:
        """Return all pairs that should be the same number, as far as measured."""
        pairs = (
            (self.everywhere, self.simulated),
            (self.loop, self.exported),
            (self.loop, self.served.measurement if self.served else None),
        )
        return tuple(compare(left, right) for left, right in pairs if left and right)

    def differs(self, right: Measurement | None) -> bool:
        """Say whether a measurement was made, and is not what the checkpoint's draft does."""
        return bool(self.loop and right and compare(self.loop, right).differs)

    def measurements(self) -> tuple[Measurement, ...]:
        """Return what was measured."""
        served = self.served.measurement if self.served else None
        every = (self.simulated, self.everywhere, self.loop, self.exported, served)
        return tuple(found for found in every if found is not None)


def judge(setup: Setup, evidence: Evidence) -> DoctorReport:
    """Return the report of everything that was measured."""
    comparisons = evidence.comparisons()
    notes = list(evidence.notes)
    if weak := [c for c in comparisons if (c.bound or 0) > TOLERANCE]:
        worst = max(c.bound or 0 for c in weak)
        notes.append(
            f"{setup.num_prompts} prompts leave differences of up to {worst:.1%} to chance, and "
            f"{TOLERANCE:.0%} is asked. Try: more prompts, eval.limit={4 * setup.num_prompts}"
        )
    return DoctorReport(
        setup,
        evidence.measurements(),
        comparisons,
        evidence.different,
        tuple(notes),
        _verdict(setup, evidence),
    )


def _verdict(setup: Setup, evidence: Evidence) -> Verdict:
    again = (
        f"Try: specforge export --checkpoint {setup.checkpoint} --format {setup.format} "
        f"-o {setup.export} --force"
    )
    served = evidence.served.measurement if evidence.served else None
    if evidence.differs(evidence.exported):
        assert evidence.exported is not None
        return _of_export(evidence, "the export", evidence.exported, again)
    if evidence.everywhere and evidence.simulated:
        pair = compare(evidence.everywhere, evidence.simulated)
        if pair.differs:
            return Verdict(
                False,
                None,
                f"the trainer simulates {_shown(evidence.simulated)} where the same draft gets "
                f"{_shown(evidence.everywhere)}{_by(pair)}: no export is part of that. Either "
                "target.engine captures other states than transformers, or the strategy's "
                f"training step and proposer disagree. Try: specforge verify CAPTURE_DIR -c "
                f"RUN.yaml, and specforge check {setup.strategy}",
            )
    if evidence.served and evidence.differs(served):
        assert served is not None
        who = f"the export, served by {evidence.served.engine},"
        return _of_export(evidence, who, served, again)
    if found := _first(evidence.different, (TEMPLATE,)):
        return Verdict(
            False,
            TEMPLATE,
            f"the numbers agree with each other, but not with the training: {found}. Try: "
            "data.chat_template_kwargs and target.path as in training, or train again",
        )
    unread = next((item for item in evidence.different if item.cause not in UNNAMED), None)
    if evidence.served is None and unread is not None:
        return Verdict(
            False,
            unread.cause,
            "what was measured agrees, but the export is not the checkpoint's in what only an "
            f"engine reads: {unread} ({unread.cause}). {again}",
        )
    return Verdict(True, None, _healthy(evidence))


def _of_export(evidence: Evidence, who: str, measured: Measurement, again: str) -> Verdict:
    """Say which part of an export makes it worse than its checkpoint."""
    assert evidence.loop is not None
    effect = (
        f"is refused ({measured.refused.partition(' Try')[0]})"  # the next command is ours
        if measured.refused
        else f"gets {_shown(measured)} accepted, its checkpoint {_shown(evidence.loop)}"
        f"{_by(compare(evidence.loop, measured))}"
    )
    if evidence.explained:
        causes = evidence.explained
        first = _first(evidence.different, causes[:1])
        together = f" together with {', '.join(causes[1:])}" if causes[1:] else ""
        return Verdict(
            False, causes[0], f"{who} {effect}. Cause: {causes[0]}{together}: {first}. {again}"
        )
    as_is = "but is exactly what this checkpoint exports"
    if any(item.cause != TEMPLATE for item in evidence.different):
        as_is = "and exporting it again does not help"
    remedy = (
        f"it is served differently than it was trained. Look at {LOOK_AT}"
        if evidence.served
        else "exporting rounds too much of it away. Try: strategy.export_dtype=float32, or what "
        "the strategy calls it"
    )
    return Verdict(False, None, f"{who} {effect}, {as_is}: {remedy}")


def _healthy(evidence: Evidence) -> str:
    if evidence.served is None:
        return "the trainer and the reference agree on what is accepted; no engine was measured"
    return f"the trainer, the reference and {evidence.served.engine} agree on what is accepted"


def _first(different: Sequence[Difference], causes: Sequence[str]) -> Difference | None:
    return next((item for item in different if item.cause in causes), None)


def _shown(found: Measurement) -> str:
    return "nothing" if found.value is None else f"{found.value:.3f}"


def _by(pair: Comparison) -> str:
    if pair.difference is None or pair.bound is None:
        return ""
    return f" ({pair.difference:+.1%}; chance explains {pair.bound:.1%})"
