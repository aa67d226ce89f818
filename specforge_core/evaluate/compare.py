"""`specforge plot`: what runs have logged, side by side in one picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..documents import open_regular
from ..errors import CheckpointError, ConfigError, RunError
from ..files import prepare_folder, refusing, write_file
from .curves import PHASE, VIEWS, Curves, is_phase
from .plot import as_label

# dashes and gaps, in widths of the line: as many as one run has names with five sets of prompts
LONG, DOT = (6, 2), (1, 2)
DASHES = ((), (4, 2), DOT, LONG + DOT, LONG + DOT * 2, LONG * 2 + DOT, (10, 3), (2, 5))
MANY = 30  # points; fewer are marked
LEGEND = 12  # lines that a legend still helps with
BEGINNING = 4  # bytes that tell a kind of picture
NO_PICTURES = {"pgf", "raw", "rgba"}  # of matplotlib: for LaTeX, or of no size that they say


def plot_runs(runs: Sequence[Path], picture: Path) -> None:
    """Draw loss, acceptance, throughput and phases of some runs; a colour each.

    The ending of `picture` says which kind it is.  Raises CheckpointError for a run that has
    logged nothing, ConfigError where another kind of file is there, or no picture ends so.
    """
    kind = picture.suffix[1:].lower()
    if kind not in (known := Figure().canvas.get_supported_filetypes().keys() - NO_PICTURES):
        raise ConfigError(
            f"{picture} has the ending of no picture that can be drawn, which are "
            f"{', '.join(sorted(known))}. Try: -o PLOT.png"
        )
    data = draw_runs(runs, kind)
    if picture.exists() and not _may_replace(picture, data):
        raise ConfigError(
            f"{picture} is there and no {kind.upper()}. Move it away, or try: -o OTHER.{kind}"
        )
    with refusing(ConfigError, f"Make room there, or try: -o OTHER.{kind}", picture):
        prepare_folder(picture.parent)
    with refusing(RunError, "Make room there, then run the same command again"):
        write_file(picture, data)


def _may_replace(path: Path, data: bytes) -> bool:
    """Say whether a file is empty or an earlier picture of the kind of `data`."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(BEGINNING) in (data[:BEGINNING], b"")
    except OSError:
        return False


def draw_runs(runs: Sequence[Path], kind: str = "png") -> bytes:
    """Return the picture as a file of that kind has it.  Raises what `plot_runs` does."""
    data = io.BytesIO()
    figure_of(runs).savefig(data, format=kind)
    return data.getvalue()


def figure_of(runs: Sequence[Path]) -> Figure:
    """Return the picture: a panel for each view of which a run has a metric."""
    found = [Curves.of(run) for run in runs]
    for curves in found:
        curves.refresh()
        if not curves.names(_is_drawn):
            raise CheckpointError(
                f"{curves.path} holds no metrics yet. Try: specforge train -c RUN.yaml"
            )
    labels = _labels(found)
    views = [view for view in VIEWS if any(curves.names(view[1]) for curves in found)]
    phases = any(curves.names(is_phase) for curves in found)
    figure = Figure(figsize=(7, 3.2 * (len(views) + phases)), dpi=140, layout="constrained")
    panels = figure.subplots(len(views) + phases, squeeze=False)[:, 0]
    for axes, (title, chosen) in zip(panels, views, strict=False):
        for number, (curves, label) in enumerate(zip(found, labels, strict=True)):
            for style, name in enumerate(curves.names(chosen)):
                points = curves.series(name)
                axes.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    dashes=DASHES[style % len(DASHES)],
                    color=f"C{number % 10}",
                    marker="o" if len(points) < MANY else "",
                    markersize=3,
                    label=as_label(f"{label}: {name}"),
                )
        axes.set_ylabel(title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if 0 < len(axes.lines) <= LEGEND:
            axes.legend(frameon=False, fontsize="small")
    if phases:
        _phases(panels[-1], found, labels)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _is_drawn(name: str) -> bool:
    return is_phase(name) or any(chosen(name) for _, chosen in VIEWS)


def _phases(axes: Axes, found: Sequence[Curves], labels: Sequence[str]) -> None:
    """Draw where the time of each run went, as parts of a bar."""
    names = list(dict.fromkeys(name for curves in found for name in curves.names(is_phase)))
    left = [0.0] * len(found)
    for name in names:
        totals = [sum(value for _, value in curves.series(name)) for curves in found]
        label = as_label(name.removeprefix(PHASE))
        axes.barh([as_label(run) for run in labels], totals, 0.6, left, label=label)
        left = [before + more for before, more in zip(left, totals, strict=True)]
    axes.set_xlabel("seconds in each part of the run")
    axes.legend(  # above: bars may fill the panel
        frameon=False,
        fontsize="small",
        ncols=min(len(names), 5),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _labels(found: Sequence[Curves]) -> list[str]:
    """Return a name for each run: its folder's, or its path where two have the same."""
    names = [curves.name for curves in found]
    paths = [str(curves.path.parent) for curves in found]
    return [
        name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)
    ]
