"""The result of an evaluation: JSON for programs, a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .decode import Answer, DecodeStats
from .lossless import Difference

SHOWN = 5  # differences that a report spells out


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt, answered with the draft and, for comparison, by the target alone."""

    where: str  # "file.jsonl:12"
    answer: Answer
    alone: Answer | None
    difference: Difference | None  # greedy only


@dataclass(frozen=True)
class SetReport:
    """What one prompt set measured.  None: not measured."""

    num_prompts: int
    acceptance_length: float | None  # tokens emitted per verification, see DecodeStats
    per_position: tuple[float, ...]  # [k]: part of the tokens drafted there that were accepted
    verifications: int
    drafted: int  # tokens of chains, levels of trees
    accepted: int
    nodes: int  # drafted tokens that the target ran on: as `drafted`, but for trees
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    new_tokens: int
    tokens_per_second: float | None  # prompt processing included, as in the next one
    baseline_tokens_per_second: float | None  # the target alone, on the same prompts
    mismatches: int | None  # answers that are not the target's own; None: not compared
    extra_target_runs: int  # beside one per verification: a recurrent state restored, run again
    ties: int  # answers that part from the target's where its two best tokens are tied


@dataclass(frozen=True)
class Setup:
    """The part of a report that is known before anything is measured."""

    strategy: str
    target: str
    temperature: float
    dtype: str
    device: str
    max_new_tokens: int
    max_draft_tokens: int
    at_once: int  # answers decoded side by side, which share the CPU; both speeds are one answer's
    draft: str | None = field(default=None, kw_only=True)  # where `specforge eval` read it


@dataclass(frozen=True)
class EvalReport(SetReport, Setup):
    """What `specforge eval` measured, over all prompts and per set."""

    lossless: bool | None  # true: every greedy answer was compared and equal (but for ties)
    lossless_reason: str
    differences: tuple[str, ...]  # the first few
    per_set: Mapping[str, SetReport]

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summarize(setup: Setup, results: Mapping[str, Sequence[PromptResult]]) -> EvalReport:
    """Build the report from every prompt's result, by set."""
    everything = [result for found in results.values() for result in found]
    whole = _set_report(everything, greedy=setup.temperature == 0)
    lossless, reason = _lossless(whole, setup.temperature)
    return EvalReport(
        **asdict(setup),
        **asdict(whole),
        lossless=lossless,
        lossless_reason=reason,
        differences=tuple(_describe(r) for r in everything if r.difference)[:SHOWN],
        per_set={
            name: _set_report(found, greedy=setup.temperature == 0)
            for name, found in results.items()
        },
    )


def as_metrics(report: EvalReport) -> dict[str, float]:
    """Return what a training logs of an evaluation; sets without a verification have no length."""
    found = {"eval/verifications": float(report.verifications)}
    if report.acceptance_length is not None:
        found["acceptance/length"] = report.acceptance_length
    for name, part in report.per_set.items():
        if part.acceptance_length is not None:
            found[f"acceptance/length/{name}"] = part.acceptance_length
    return found


def render(report: EvalReport) -> Group:
    """Return a table of the report for `rich.console.Console.print`."""
    sampling = f"temperature {report.temperature:g}" if report.temperature else "greedy"
    table = Table(title=f"{report.strategy} on {report.target}, {sampling}, {report.dtype}")
    table.add_column("prompts")
    for name in ("number", "acceptance length", "accepted / drafted", "tokens/s", "alone"):
        table.add_column(name, justify="right")
    table.add_column("speed-up", justify="right")
    for name, row in report.per_set.items():
        table.add_row(name, *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(report))
    rates = " ".join(f"{rate:.2f}" for rate in report.per_position)
    lines = [f"accepted by position: {rates}", f"lossless: {report.lossless_reason}"]
    if report.nodes > report.drafted:
        nodes, levels, kept = (
            f"{count / report.verifications:.2f}"
            for count in (report.nodes, report.drafted, report.accepted)
        )
        lines.append(
            f"a verification: {nodes} tokens of a tree, on {levels} levels, {kept} accepted"
        )
    if report.extra_target_runs:
        lines.append(
            f"the target ran {report.extra_target_runs} times more than {report.verifications} "
            "verifications take: its state cannot be rolled back, so accepted tokens run again"
        )
    return Group(table, *(Text(line) for line in (*lines, *report.differences)))


def _cells(row: SetReport) -> list[str]:
    speed, alone = row.tokens_per_second, row.baseline_tokens_per_second
    return [
        str(row.num_prompts),
        _number(row.acceptance_length, 3),
        f"{row.accepted} / {row.drafted}",
        _number(speed, 1),
        _number(alone, 1),
        f"{speed / alone:.2f}x" if speed and alone else "-",
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _set_report(results: Sequence[PromptResult], *, greedy: bool) -> SetReport:
    stats = sum((r.answer.stats for r in results), DecodeStats())
    alone = sum((r.alone.stats for r in results if r.alone), DecodeStats())
    compared = greedy and all(r.alone for r in results)
    differences = [r.difference for r in results if r.difference]
    ties = sum(difference.tie for difference in differences)
    return SetReport(
        num_prompts=len(results),
        acceptance_length=stats.acceptance_length,
        per_position=stats.per_position,
        verifications=stats.verifications,
        drafted=stats.drafted,
        accepted=stats.accepted,
        nodes=stats.nodes,
        drafted_at=stats.drafted_at,
        accepted_at=stats.accepted_at,
        new_tokens=stats.new_tokens,
        tokens_per_second=stats.tokens_per_second,
        baseline_tokens_per_second=alone.tokens_per_second,
        mismatches=len(differences) - ties if compared else None,
        extra_target_runs=stats.extra_runs,
        ties=ties,
    )


def _lossless(whole: SetReport, temperature: float) -> tuple[bool | None, str]:
    if temperature:
        return None, "not compared: sampled answers differ from run to run"
    if whole.mismatches is None:
        return None, "not compared. Try: eval.compare=true"
    tied = f", {whole.ties} of them up to a tie of the target's two best" if whole.ties else ""
    equal = whole.num_prompts - whole.mismatches
    text = f"{equal} of {whole.num_prompts} greedy answers equal the target's own{tied}"
    return whole.mismatches == 0, text


def _describe(result: PromptResult) -> str:
    found = result.difference
    assert found is not None
    kind = "tie" if found.tie else "mismatch"
    return (
        f"{result.where}: {kind} at token {found.place}: {found.ours} for {found.expected}, "
        f"{found.gap:.3g} below the target's best logit"
    )
