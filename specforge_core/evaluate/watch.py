"""`specforge watch`: a run's numbers in the terminal, redrawn as it logs them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..claim import running
from ..errors import CheckpointError
from ..stop import Interrupted
from ..text import harmless
from .curves import PHASE, VIEWS, Curves, Point, is_phase

POLL_SECONDS = 0.5  # between two looks, whether the run goes on
BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 5  # lines of a chart, at most
TOP = 3  # lines of the phases, and below the charts
FRAME = 2  # lines of a chart's frame
LEAST = 20  # columns of one
SPARE = 18  # columns beside it, for numbers and frames


def watch(output_dir: Path, every: float, console: Console) -> None:
    """Show a run's numbers until it ends; on a terminal redrawn in place, else a line an update.

    A run that is not going on is shown once.  Raises CheckpointError where there is none, and
    Interrupted with what to say when the user has seen enough.
    """
    curves = Curves.of(output_dir)
    going = running(output_dir)
    curves.refresh()
    if not going and not curves.rows:
        raise CheckpointError(
            f"{output_dir} holds no run that has logged anything, and none is going on there. "
            "Try: specforge train -c RUN.yaml"
        )
    try:
        if console.is_terminal:
            _redraw(output_dir, curves, every, console)
        else:
            _print(output_dir, curves, every, console)
    except Interrupted as exc:
        exc.kept = "the run goes on"
        raise
    state = "the run has ended" if going else "no run is going on"
    console.print(f"{state} in {output_dir}", markup=False, highlight=False, soft_wrap=True)


def _redraw(output_dir: Path, curves: Curves, every: float, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        changed = True
        while True:
            going = running(output_dir)  # before the last lines are read
            if curves.refresh() or changed:
                live.update(charts(curves, *console.size), refresh=True)
                changed = False
            if not going:
                return
            _wait(output_dir, every)


def _print(output_dir: Path, curves: Curves, every: float, console: Console) -> None:
    told = ""
    while True:
        going = running(output_dir)
        curves.refresh()
        if curves.rows and (now := line(curves)) != told:
            told = now
            console.print(now, markup=False, highlight=False, soft_wrap=True)
        if not going:
            return
        _wait(output_dir, every)


def _wait(output_dir: Path, every: float) -> None:
    """Wait for the next look; less long where the run ends."""
    until = time.monotonic() + every
    while (left := until - time.monotonic()) > 0 and running(output_dir):
        time.sleep(min(left, POLL_SECONDS))


def line(curves: Curves) -> str:
    """Return the newest numbers in one line."""
    parts = [f"step {_step(curves)}"]
    for _, chosen in VIEWS:
        for name in curves.names(chosen):
            if points := curves.series(name):
                parts.append(f"{harmless(name)} {_number(points[-1][1])}")
    return "  ".join([*parts, *shares(curves)])


def shares(curves: Curves) -> list[str]:
    """Return which part of the time each phase took, in the newest line that says it."""
    for row in reversed(curves.rows):
        spent = {name.removeprefix(PHASE): row[name] for name in row if is_phase(name)}
        if 0 < (total := sum(spent.values())) < math.inf:
            return [f"{harmless(name)} {value / total:.0%}" for name, value in spent.items()]
    return []


def charts(curves: Curves, width: int, height: int) -> Group:
    """Return the chart of each metric that is looked at, and the phases.

    All fit into a terminal of `height` lines; where there are too many, their numbers do.
    """
    clock = [_clock(seconds) for _, seconds in curves.series("seconds")[-1:]]
    found: list[Panel | Text] = [
        Text("  ".join([f"step {_step(curves)}", *clock, *shares(curves)]))
    ]
    names = [name for _, chosen in VIEWS for name in curves.names(chosen)]
    series = {name: points for name in names if (points := curves.series(name))}
    lines = min(HEIGHT, (height - TOP) // max(1, len(series)) - FRAME)
    for name, points in series.items():
        title = Text(f"{harmless(name)} {_number(points[-1][1])}")
        if lines > 0:
            drawn = chart(points, max(LEAST, width - SPARE), lines)
            text = Text("\n".join(drawn), no_wrap=True, overflow="crop")
            found.append(Panel(text, title=title, title_align="left"))
        else:
            found.append(title)
    return Group(*found)


def _step(curves: Curves) -> int:
    """Return the last step; what was measured beside the training is of an earlier one."""
    return int(max((row["step"] for row in curves.rows), default=0.0))


def chart(points: Sequence[Point], width: int, height: int = HEIGHT) -> list[str]:
    """Draw points as columns of block letters, the mean of those that share one; lines from above.

    The first and the last line end with the largest and the smallest mean.
    """
    first, last = points[0][0], points[-1][0]
    columns = min(width, len(points))
    sums: list[list[float]] = [[] for _ in range(columns)]
    for step, value in points:
        place = (step - first) * (columns - 1) / max(last - first, 1)
        sums[round(place)].append(value)
    means = [sum(values) / len(values) if values else math.nan for values in sums]
    low, high = min(filter(_is_there, means)), max(filter(_is_there, means))
    levels = [_level(mean, low, high, height) for mean in means]
    lines = [
        "".join(BLOCKS[max(0, min(8, level - 8 * row))] for level in levels)
        for row in reversed(range(height))
    ]
    lines[0] += f" {_number(high)}"
    lines[-1] += f" {_number(low)}"
    return lines


def _is_there(mean: float) -> bool:
    return not math.isnan(mean)


def _level(mean: float, low: float, high: float, height: int) -> int:
    """Return how many eighths of a line a column is high: one at least, none without a point."""
    if not _is_there(mean):
        return 0
    return 1 + round((mean - low) / ((high - low) or 1.0) * (8 * height - 1))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}"
