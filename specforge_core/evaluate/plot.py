"""Plots of a run: acceptance by draft position, and the loss curve.

Figures are drawn without pyplot, so no window system and no global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, RunError
from ..files import make_folder, refusing, write_file
from ..text import harmless
from .curves import Curves
from .report import EvalReport, SetReport

if TYPE_CHECKING:  # every training imports this module, and few draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX"


def plot_acceptance(report: EvalReport, png: Path) -> None:
    """Draw the part of the drafted tokens accepted at each position, a line per prompt set."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = _figure()
    sets: Mapping[str, SetReport] = report.per_set
    for number, (name, found) in enumerate(sets.items()):
        length = found.acceptance_length
        label = as_label(name)
        if length is not None:
            label += f": {length:.2f} tokens per verification"
        marker = MARKERS[number % len(MARKERS)]
        places = range(1, len(found.per_position) + 1)
        axes.plot(places, found.per_position, marker=marker, markersize=5, label=label)
    axes.set_title(as_label(f"{report.strategy} on {Path(report.target).name}"))
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted, of those drafted there")
    highest = max((rate for found in sets.values() for rate in found.per_position), default=0.0)
    axes.set_ylim(0, min(1.02, 1.15 * highest) or 1.02)
    axes.legend(frameon=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _save(figure, png)


def plot_loss(metrics: Path, png: Path) -> None:
    """Draw the loss of a run's metrics.jsonl over its steps.

    Raises CheckpointError when the file is missing or holds no losses.
    """
    from matplotlib.ticker import MaxNLocator

    points = _curves(metrics).series("loss")
    if not points:
        raise CheckpointError(f"{metrics} holds no losses yet. Try: specforge train")
    steps, losses = zip(*points, strict=True)
    figure, axes = _figure()
    axes.plot(steps, losses, marker="o" if len(steps) < 30 else "", markersize=3)
    axes.set_title(f"training loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, png)


# by name in metrics.jsonl: what the curve is called
LENGTHS = {
    "acceptance_length": "simulated, on what is trained on",
    "validation/acceptance_length": "simulated, on data.validation",
    "acceptance/length": "real, decoding eval.prompts",
}


def plot_progress(metrics: Path, png: Path) -> bool:
    """Draw the simulated and the real acceptance lengths of a run over its steps.

    Returns False where metrics.jsonl has none.  Raises CheckpointError when it cannot be read.
    """
    from matplotlib.ticker import MaxNLocator

    curves = _curves(metrics)
    figure, axes = _figure()
    for number, (name, label) in enumerate(LENGTHS.items()):
        found = curves.series(name)
        if found:
            marker = MARKERS[number] if len(found) < 30 else ""
            axes.plot(*zip(*found, strict=True), marker=marker, markersize=5, label=label)
    if not axes.lines:
        return False
    axes.set_title("acceptance length in training")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("tokens per verification")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    _save(figure, png)
    return True


def as_label(name: str) -> str:
    """Return a name as matplotlib shows it: as no formula, and as none that a legend leaves out."""
    shown = harmless(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _curves(metrics: Path) -> Curves:
    curves = Curves(metrics, metrics.parent.name)
    if not curves.refresh() and not metrics.exists():
        raise CheckpointError(f"{metrics} cannot be read: it is not there. Try: specforge train")
    return curves


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, png: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    with refusing(RunError, "Make room there, then run the same command again"):
        make_folder(png.parent)
        write_file(png, data.getvalue())
