"""What was found: JSON for programs, tables and one sentence for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .causes import Difference
from .stats import TOLERANCE, Comparison, Measurement

SHOWN = 12  # differences that a table spells out


@dataclass(frozen=True, slots=True)
class Setup:
    """What was compared."""

    strategy: str
    target: str
    checkpoint: str
    step: int
    export: str
    format: str
    dtype: str  # of the reference
    num_prompts: int
    max_new_tokens: int
    draft_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the numbers say."""

    healthy: bool
    cause: str | None  # the first that explains the difference
    message: str  # with the next command


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything that was measured, and what it says."""

    setup: Setup
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    different: tuple[Difference, ...]  # the export from a fresh one
    notes: tuple[str, ...]
    verdict: Verdict

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        value = {
            "healthy": self.verdict.healthy,
            "cause": self.verdict.cause,
            "message": self.verdict.message,
            **asdict(self.setup),
            "tolerance": TOLERANCE,
            "measurements": {m.name: _row(m) for m in self.measurements},
            "comparisons": [{**asdict(c), "differs": c.differs} for c in self.comparisons],
            "differences": [asdict(item) for item in self.different],
            "notes": self.notes,
        }
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def render(report: DoctorReport) -> Group:
    """Return tables of the report for `rich.console.Console.print`."""
    setup = report.setup
    table = Table(
        title=f"{setup.strategy} on {setup.target}: {setup.num_prompts} prompts, greedy, "
        f"{setup.draft_tokens} drafted tokens"
    )
    table.add_column("acceptance length")
    table.add_column("mean", justify="right")
    table.add_column("± 95 %", justify="right")
    table.add_column("verifications", justify="right")
    for found in report.measurements:
        table.add_row(found.name, *_cells(found))
    compared = Table()
    for name in ("of", "and of", "difference", "chance explains", ""):
        compared.add_column(name, justify="right" if "c" in name else "left")
    for pair in report.comparisons:
        compared.add_row(pair.left, pair.right, *_verdict(pair))
    lines = [f"{item} ({item.cause})" for item in report.different[:SHOWN]]
    if len(report.different) > SHOWN:
        lines.append(f"and {len(report.different) - SHOWN} more differences of the export")
    return Group(table, compared, *(Text(line) for line in (*lines, *report.notes)))


def _row(found: Measurement) -> dict[str, object]:
    return {
        "acceptance_length": found.value,
        "relative_bound": found.bound,
        "emitted": sum(t.emitted for t in found.tallies),
        "verifications": sum(t.verifications for t in found.tallies),
        "refused": found.refused,
    }


def _cells(found: Measurement) -> tuple[str, str, str]:
    if found.value is None or found.bound is None:
        return ("refused" if found.refused else "-", "", "")
    count = sum(t.verifications for t in found.tallies)
    return f"{found.value:.3f}", f"{found.value * found.bound:.3f}", f"{count:.0f}"


def _verdict(pair: Comparison) -> tuple[str, str, str]:
    if pair.difference is None or pair.bound is None:
        return "-", "-", "differs"
    return (
        f"{pair.difference:+.1%}",
        f"{pair.bound:.1%}",
        "differs" if pair.differs else "agrees",
    )
