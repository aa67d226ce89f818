from __future__ import annotations

import io
import json
import math
import os
import re
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from specforge_core.claim import claim, running
from specforge_core.cli import cli
from specforge_core.errors import CheckpointError, ConfigError
from specforge_core.evaluate import watch
from specforge_core.evaluate.compare import draw_runs, figure_of, plot_runs
from specforge_core.evaluate.curves import Curves
from specforge_core.evaluate.watch import chart, line
from specforge_core.locks import hold, release
from specforge_core.stop import Interrupted
from specforge_core.train.metrics import MetricsFile

ROW = {"loss": 2.0, "acceptance_length": 1.5, "tokens_per_second": 1234.0}
PHASES = {"seconds_data": 1.0, "seconds_forward": 3.0}


def write(folder: Path, *rows: dict[str, float], first: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    file = MetricsFile(folder)
    for step, row in enumerate(rows, first):
        file.log(step, row)
    return folder


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_a_picture_replaces_a_picture_and_nothing_else(tmp_path: Path) -> None:
    run = write(tmp_path / "run", ROW)
    before = (run / "metrics.jsonl").read_bytes()
    for name in ("metrics.jsonl", "notes.txt", "", "a.pgf"):
        message = r"has the ending of no picture .* jpg, pdf, png, .* -o PLOT\.png"
        with pytest.raises(ConfigError, match=message):
            plot_runs([run], run / name)
    (run / "notes.png").write_text("mine")
    (run / "folder.png").mkdir()
    for name in ("notes.png", "folder.png"):
        with pytest.raises(ConfigError, match=rf"{name} is there and no PNG.*-o OTHER\.png"):
            plot_runs([run], run / name)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "notes.png").read_text() == "mine"
    for _ in range(2):
        plot_runs([run], tmp_path / "new/folder/plot.png")
    assert size((tmp_path / "new/folder/plot.png").read_bytes())
    plot_runs([run], tmp_path / "plot.PDF")
    assert (tmp_path / "plot.PDF").read_bytes().startswith(b"%PDF")
    with pytest.raises(
        ConfigError, match=r"cannot be written: Not a directory\. Correct that path"
    ):
        plot_runs([run], run / "notes.png" / "plot.png")


def test_lines_are_read_as_they_come_and_anew_after_a_resume(tmp_path: Path) -> None:
    curves = Curves.of(tmp_path / "run")
    assert not curves.refresh()
    write(tmp_path / "run", {"loss": 3.0}, {"loss": float("nan")}, {"loss": 1.0})
    assert curves.refresh()
    assert curves.series("loss") == [(1, 3.0), (3, 1.0)]
    assert not curves.refresh()
    with curves.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert not curves.refresh()
    with curves.path.open("a") as file:
        file.write('ss": 0.5}\n')
    assert curves.refresh()
    assert curves.series("loss")[-1] == (4, 0.5)
    MetricsFile(tmp_path / "run").start({"logged": 2, "step": 2})  # the run goes on from step 2
    write(tmp_path / "run", {"loss": 0.1}, first=3)
    assert curves.refresh()
    assert curves.series("loss") == [(1, 3.0), (3, 0.1)]


@pytest.mark.parametrize(
    "text",
    [
        *("x\n", "[1]\n", '{"loss": 1}\n', '{"step": null}\n', "[" * 9**5),
        *('{"step": "5", "loss": 1}\n', '{"step": true, "loss": 1}\n'),
        *('{"step": NaN, "loss": 1}\n', '{"step": 1e300, "loss": 1}\n'),
    ],
)
def test_what_is_no_metrics_is_said(tmp_path: Path, text: str) -> None:
    good = '{"step": 1, "loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(good * 2 + text + "\n")
    curves, shown = Curves.of(tmp_path), re.escape(repr(text.splitlines()[0][:30])[:-1])
    message = rf"metrics\.jsonl cannot be read: its line 3 is no metrics: {shown}"
    with pytest.raises(CheckpointError, match=message):
        curves.refresh()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        Curves.of(tmp_path).refresh()


def test_a_run_that_is_a_link_to_itself_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    for place in (tmp_path / "run", tmp_path / "run" / "metrics.jsonl"):
        with pytest.raises(CheckpointError, match="cannot be read: Too many levels of symbolic"):
            Curves.of(place).refresh()


def test_runs_are_drawn_together_with_what_they_have(tmp_path: Path) -> None:
    loss = write(tmp_path / "a", {"loss": 3.0}, {"loss": 2.0})
    more = write(tmp_path / "b", {**ROW, **PHASES, "validation/loss": 2.5, "acceptance/chat": 1.4})
    panels = figure_of([loss, more]).axes
    titles = ["loss", "acceptance length", "tokens per second"]
    assert [axes.get_ylabel() for axes in panels[:3]] == titles
    assert panels[3].get_xlabel() == "seconds in each part of the run"
    drawn = {line.get_label(): list(line.get_ydata()) for axes in panels for line in axes.lines}
    assert drawn == {
        "a: loss": [3.0, 2.0],
        "b: loss": [2.0],
        "b: validation/loss": [2.5],
        "b: acceptance_length": [1.5],
        "b: acceptance/chat": [1.4],
        "b: tokens_per_second": [1234.0],
    }
    assert [bar.get_width() for bar in panels[3].patches] == [0.0, 1.0, 0.0, 3.0]
    assert len(figure_of([loss]).axes) == 1


def test_the_command_writes_one_picture_and_names_what_has_nothing(tmp_path: Path) -> None:
    run, png = write(tmp_path / "a", ROW), tmp_path / "all.png"
    done = CliRunner().invoke(cli, ["plot", str(run), f"{run}/metrics.jsonl", "-o", str(png)])
    assert done.output == f"wrote {png}\n"
    assert size(png.read_bytes())[0] == 980
    with pytest.raises(CheckpointError, match=r"none/metrics\.jsonl holds no metrics yet"):
        figure_of([run, tmp_path / "none"])
    with pytest.raises(CheckpointError, match="holds no metrics yet"):
        figure_of([write(tmp_path / "other", {"grad_norm": 1.0})])


@pytest.mark.parametrize(
    "rows",
    [
        [{"loss": 1.7e308}, {"loss": -1.7e308}, {"loss": 1.0}],
        [{"loss": math.nan, "seconds": math.nan, "seconds_data": math.inf}, {"loss": 1.0}],
        [{"loss": 1.0, "seconds_data": -2.0, "seconds": math.inf}],
        [{"loss": 1.0, "acceptance/length/[/a] $x_{$": 2.0}],  # a set of prompts has any name
    ],
)
def test_whatever_a_run_has_logged_is_shown_and_drawn(
    tmp_path: Path, rows: list[dict[str, float]]
) -> None:
    run = write(tmp_path / "_a", *rows)  # a legend leaves out what begins like this
    assert "loss 1" in told(run, terminal=False)
    assert "loss" in told(run, terminal=True)
    assert "▁" in told(run, terminal=True, width=5)
    figure = figure_of([run])
    drawn = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert drawn == {" _a: loss"}
    assert draw_runs([run]).startswith(b"\x89PNG")
    if "acceptance/length/[/a] $x_{$" in rows[0]:
        assert "acceptance/length/[/a] $x_{$ 2" in told(run, terminal=True)


def test_what_was_made_up_for_is_at_its_step(tmp_path: Path) -> None:
    """An evaluation beside the training is logged late, one that was cut off at a resume."""
    run = write(tmp_path / "a", {"loss": 3.0, "seconds": 61.0}, {"loss": 2.0}, {"loss": 1.0})
    write(run, {"acceptance/length": 1.5}, first=3)
    write(run, {"acceptance/length": 1.25}, first=1)
    curves = Curves.of(run)
    curves.refresh()
    assert curves.series("acceptance/length") == [(1, 1.25), (3, 1.5)]
    assert line(curves) == "step 3  loss 1  acceptance/length 1.5"
    shown = told(run, terminal=True)
    assert "acceptance/length 1.5" in shown
    assert "step 3  0:01:01" in shown


def test_a_chart_has_the_mean_of_the_steps_that_share_a_column() -> None:
    assert chart([(1, 0.0), (2, 1.0)], 10, height=1) == ["▁█ 1 0"]
    points = [(step, float(step % 2)) for step in range(1, 9)]
    assert chart(points, 2, height=2) == ["   0.5", "▁▁ 0.5"]
    # one without a point is empty
    assert chart([(1, 1.0), (2, 2.0), (9, 3.0)], 3, height=1) == ["▁ █ 3 1.5"]


def told(output_dir: Path, terminal: bool, width: int = 60) -> str:
    file = io.StringIO()
    watch.watch(output_dir, 0.1, Console(file=file, force_terminal=terminal, width=width))
    return file.getvalue()


def test_all_charts_fit_into_the_terminal(tmp_path: Path) -> None:
    many = {**ROW, "validation/loss": 2.5, **{f"acceptance/{n}": 1.0 for n in range(3)}}
    curves = Curves.of(write(tmp_path / "a", many, {**many, **PHASES}))
    curves.refresh()
    for width, height, drawn in ((60, 80, 5), (30, 24, 1), (60, 12, 0)):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
        shown = console.render_lines(watch.charts(curves, *console.size))
        text = ["".join(segment.text for segment in line) for line in shown]
        assert len(text) < height
        assert text[0].startswith("step 2  data 25%  forward 75%")
        assert sum("tokens_per_second 1,234" in line for line in text) == 1
        assert len(text) == 1 + 7 * (drawn + 2 if drawn else 1)


def test_a_run_that_ended_is_shown_once(tmp_path: Path) -> None:
    run = write(tmp_path / "a", {"loss": 3.0}, {**ROW, **PHASES, "acceptance/chat": 1.25})
    assert told(run, False) == (
        "step 2  loss 2  acceptance_length 1.5  acceptance/chat 1.25  tokens_per_second 1,234  "
        f"data 25%  forward 75%\nno run is going on in {run}\n"
    )
    shown = told(run, True)
    for text in ("loss 2", "acceptance/chat 1.25", "tokens_per_second 1,234", "forward 75%", "█"):
        assert text in shown


def test_there_is_nothing_to_watch_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none is going on there\. Try: specforge train"):
        told(tmp_path, False)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_watched_to_its_end(tmp_path: Path, terminal: bool) -> None:
    def run() -> None:
        with claim(tmp_path):
            begun.set()
            for step in (1, 2, 3):
                write(tmp_path, {"loss": step + 0.5}, first=step)
                until = time.monotonic() + 20
                while f"loss {step}.5" not in shown.getvalue() and time.monotonic() < until:
                    time.sleep(0.01)

    begun, shown = threading.Event(), io.StringIO()
    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    watch.watch(tmp_path, 0.1, Console(file=shown, force_terminal=terminal, width=60))
    thread.join()
    assert [f"loss {step}.5" in shown.getvalue() for step in (1, 2, 3)] == [True] * 3
    assert shown.getvalue().endswith(f"the run has ended in {tmp_path}\n")


def test_a_signal_ends_the_watching_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(output_dir: Path, every: float) -> None:
        raise Interrupted(2)

    monkeypatch.setattr(watch, "_wait", signalled)
    with claim(tmp_path):
        write(tmp_path, ROW)
        with pytest.raises(Interrupted, match="SIGINT: the run goes on"):
            told(tmp_path, False)


def test_looking_for_a_run_stops_none_from_beginning(tmp_path: Path) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            running(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with claim(tmp_path):
            (tmp_path / "kept").touch()
            assert running(tmp_path)
    done.set()
    for thread in threads:
        thread.join()
    assert not running(tmp_path)


def test_a_run_begins_however_long_others_look_for_one(tmp_path: Path) -> None:
    with claim(tmp_path):
        (tmp_path / "kept").touch()
    with (tmp_path / ".lock").open("rb") as lock:
        assert hold(lock, shared=True)
        threading.Timer(0.5, release, (lock,)).start()
        with claim(tmp_path):
            assert running(tmp_path)


def test_line_leaves_out_what_a_run_does_not_log(tmp_path: Path) -> None:
    curves = Curves.of(write(tmp_path / "a", {"loss": 3.0, "grad_norm": 1.0}))
    curves.refresh()
    assert line(curves) == "step 1  loss 3"
    assert json.loads(curves.path.read_text())["grad_norm"] == 1.0
