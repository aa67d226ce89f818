from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from contextlib import suppress
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specforge_core import stop
from specforge_core.errors import PluginError
from specforge_core.testing.runs import lines, load
from specforge_core.train import metrics
from specforge_core.train.dist import world
from specforge_core.train.report import Launched
from specforge_core.train.run import train
from specforge_core.train.supply import Supply
from specforge_core.train.trainer import Trainer
from specforge_core.types import RESERVED_METRICS, Ratio, StepOutput

from ..runs import linear_run

CPU = torch.device("cpu")


def output(loss: float, weight: float, /, **ratios: tuple[float, float]) -> StepOutput:
    t = torch.tensor
    return StepOutput(
        loss_sum=t(loss),
        weight=t(weight),
        metrics={name: Ratio(num=t(num), den=t(den)) for name, (num, den) in ratios.items()},
    )


def test_micro_batches_are_summed_then_divided_once() -> None:
    outputs = [output(6.0, 3.0, accuracy=(1.0, 2.0)), output(1.0, 1.0, accuracy=(0.0, 6.0))]
    extra = [70, torch.tensor(0.25), 1]  # numbers and tensors in any order
    with world(CPU):
        sums, counts = metrics.Reducer("pkg 1", CPU).reduce(outputs, extra).read()
    assert sums.ratios() == {"loss": 7 / 4, "accuracy": 1 / 8}
    assert counts == [70, 0.25, 1]
    other = metrics.Sums({"loss": (1.0, 4.0), "never": (0.0, 0.0)})
    sums.merge(other)
    assert sums.ratios() == {"loss": 1.0, "accuracy": 1 / 8}


@pytest.mark.parametrize("num", [nan, inf, -inf, 1e308])
def test_a_metric_that_is_no_number_is_left_out_and_told_once_with_its_package(
    num: float, capsys: pytest.CaptureFixture[str]
) -> None:
    reducer = metrics.Reducer("pkg 1", CPU)
    wide = Ratio(num=torch.tensor(num, dtype=torch.float64), den=torch.tensor(2.0))
    odd = StepOutput(
        loss_sum=torch.tensor(6.0), weight=torch.tensor(3.0), metrics={"odd": wide, "b": wide}
    )
    good = output(6.0, 3.0, odd=(1.0, 2.0), b=(1.0, 2.0))
    window = metrics.Sums()
    with world(CPU):
        for one in (odd, good, odd):
            window.merge(reducer.reduce([one], []).read()[0])
    assert window.ratios() == {"loss": 2.0, "odd": 0.5, "b": 0.5}
    said = capsys.readouterr().err
    for name in ("odd", "b"):
        told = f"pkg 1, specforge_train_step: the metric '{name}' came to {num:g} / 2. It is left"
        assert said.count(told) == 1


def test_the_metrics_of_a_bad_step_are_not_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    with world(CPU):
        metrics.Reducer("pkg 1", CPU).reduce([output(nan, 3.0, a=(nan, 1.0))], []).read()
    assert capsys.readouterr().err == ""


def test_what_is_not_finite_is_not_logged_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = metrics.MetricsFile(tmp_path)
    trackers = metrics.Trackers([("specforge-core", file), ("other 1.0", other := Told())])
    trackers.log(1, {"validation/loss": nan})
    trackers.log(2, {"loss": 1.0, "learning_rate": inf, "validation/loss": nan})
    assert file.path.read_text() == '{"step": 2, "loss": 1.0}\n'
    assert other.calls == ["log 2"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(", which")[0] for line in said] == [
        "warning: validation/loss of step 1 is nan",
        "warning: learning_rate of step 2 is inf",
    ]


def test_large_counts_stay_exact() -> None:
    tokens = 2**40 + 1
    with world(CPU):
        _, counts = metrics.Reducer("pkg 1", CPU).reduce([output(1.0, 1.0)], [tokens]).read()
    assert counts == [tokens]


@pytest.mark.parametrize(
    "name", [*sorted(RESERVED_METRICS), "seconds_data", "validation/accuracy", "eval/x"]
)
def test_the_cores_own_names_are_refused(name: str) -> None:
    with world(CPU), pytest.raises(PluginError) as error:
        metrics.Reducer("pkg 1", CPU).reduce([output(1.0, 1.0, **{name: (1.0, 1.0)})], [])
    assert str(error.value).startswith(
        f"pkg 1, specforge_train_step: the metric name {name!r} is the core's own"
    )


def test_a_micro_batch_with_other_metrics_is_refused() -> None:
    reducer = metrics.Reducer("pkg 1", CPU)
    message = r"its metrics were \['a'\], and now are \['a', 'b'\]. Their names must not depend"
    first, other = output(1.0, 1.0, a=(1.0, 1.0)), output(1.0, 1.0, a=(1.0, 1.0), b=(1.0, 1.0))
    with world(CPU):
        with pytest.raises(PluginError, match=message):  # in the first step
            metrics.Reducer("pkg 1", CPU).reduce([first, other], [])
        reducer.reduce([first], [])
        with pytest.raises(PluginError, match=message):  # and in a later one
            reducer.reduce([other], [])


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path: Path) -> None:
    file = metrics.MetricsFile(tmp_path)
    file.start({"step": 0, "logged": 0})
    for step in (10, 20, 30):
        file.log(step, {"loss": float(step)})
    file.close()
    with file.path.open("a") as torn:
        torn.write('{"step": 4')
    again = metrics.MetricsFile(tmp_path)
    again.start({"step": 20, "logged": 20})
    again.log(25, {"loss": 0.5})
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 25]


@pytest.mark.parametrize(
    "text", [b'{"a": 1}\n', b"[1]\n", b"\xff\n", b'{"step": "x"}\n', b"3\n", b"[" * 100_000 + b"\n"]
)
def test_lines_that_no_run_wrote_are_left_out_and_told_of(
    tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows them stays: the run has logged it, and measured by it."""
    good = b'{"step": 1, "loss": 1.0}\n'
    file = metrics.MetricsFile(tmp_path)
    file.path.write_bytes(good + text + good + b'{"step": 2, "lo')
    file.start({"step": 20, "logged": 20})
    assert file.path.read_bytes() == good + good
    told = capsys.readouterr().err
    shown = repr(text[:20].decode(errors="replace").rstrip())[:-1]
    assert f"left out as no metrics: 1 line, the first in line 2: {shown}" in told


class Told:
    """A tracker that remembers, and fails where it is told to."""

    def __init__(self, fails: str = "", raises: BaseException | None = None) -> None:
        self.fails, self.calls = fails, list[str]()
        self.raises = raises or ConnectionError("no route to host")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise self.raises

    def start(self, info: Mapping[str, Any]) -> None:
        self._note("start")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note(f"log {step}")

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        self._note(f"{name} {values['step']}")

    def close(self) -> None:
        self._note("close")


@pytest.mark.parametrize("fails", ["start", "log 2", "checkpoint 2", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, good = Told(fails), Told()
    trackers = metrics.Trackers([("specforge-broken 1.0", broken), ("good 1.0", good)])
    trackers.start({"step": 0})
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
        trackers.event("checkpoint", step=step)
    trackers.close()
    calls = [
        "start",
        *(f"{what} {i}" for i in (1, 2, 3) for what in ("log", "checkpoint")),
        "close",
    ]
    assert good.calls == calls
    assert broken.calls == calls[: calls.index(fails) + 1]
    shown = " ".join("".join(capsys.readouterr()).split())
    assert shown.count("warning: ") == 1
    assert "the tracker of specforge-broken 1.0 failed (ConnectionError: no route" in shown


@pytest.mark.parametrize("raised", [SystemExit(0), GeneratorExit("mine"), OSError(28, "no room")])
def test_a_tracker_ends_no_run_whatever_it_raises(
    raised: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = metrics.Trackers([("bad 1.0", Told("log 1", raised)), ("good 1.0", good := Told())])
    trackers.log(1, {"loss": 1.0})
    assert good.calls == ["log 1"]
    assert f"of bad 1.0 failed ({type(raised).__name__}: " in "".join(capsys.readouterr())


def test_a_tracker_edits_only_its_own_copy() -> None:
    class Editing:
        def start(self, info: dict[str, Any]) -> None:
            info["config"].clear()

        def log(self, step: int, values: dict[str, float]) -> None:
            values.clear()

    info, values, seen = {"config": {"a": 1}}, {"loss": 1.0}, []
    keeping: Any = SimpleNamespace(start=seen.append, log=lambda step, found: seen.append(found))
    trackers = metrics.Trackers([("edits", Editing()), ("keeps", keeping)])  # type: ignore[list-item]
    trackers.start(info)
    trackers.log(1, values)
    assert seen == [info, values] == [{"config": {"a": 1}}, {"loss": 1.0}]


# ---- a run that was killed or stopped writes what one that went on does ------------


TIMES = ("seconds", "tokens_per_second")


def steady(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run without what a clock says."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in lines(output_dir)
    ]


class Killed(BaseException):
    """The process is gone before the step."""


@pytest.mark.parametrize(
    ("log_every", "save_every", "interrupted"),
    [
        (1, 3, (2, 5, 10)),
        (5, 2, (1, 3, 10)),
        pytest.param(4, 3, (4, 7, 9), marks=pytest.mark.slow),
        pytest.param(3, 5, (5, 6, 9), marks=pytest.mark.slow),
        pytest.param(20, 4, (6, 9), marks=pytest.mark.slow),
    ],
)
def test_metrics_are_those_of_an_undisturbed_run(
    tmp_path: Path,
    toy_target: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
    save_every: int,
    interrupted: tuple[int, ...],
) -> None:
    config = linear_run(tmp_path, toy_target)
    options = (f"train.log_every={log_every}", f"train.save_every={save_every}")
    options += ("train.max_steps=11", "train.batch_size=1")
    train(*load(config, *options))
    launch, asked, left, kill = Trainer._optimizer_step, list[signal.Signals](), list[int](), False

    def disturbed(self: Trainer, supply: Supply) -> Launched | None:
        if left and self.step >= left[0]:
            left.pop(0)
            if kill:
                with (self.run.output_dir / "metrics.jsonl").open("a") as torn:
                    torn.write('{"step": 99, "lo')
                raise Killed
            asked.append(signal.SIGTERM)
        return launch(self, supply)

    monkeypatch.setattr(stop, "asked", lambda: asked[0] if asked else None)
    monkeypatch.setattr(Trainer, "_optimizer_step", disturbed)
    for kill in (True, False):  # or stopped
        left += interrupted
        output_dir = tmp_path / ("killed" if kill else "stopped")
        other = (*options, f"output_dir={output_dir}")
        while True:
            asked.clear()
            with suppress(Killed):
                if train(*load(config, *other)).finished:
                    break
        assert not left
        assert steady(output_dir) == steady(tmp_path / "run")
        train(*load(config, *other))  # and starting a finished run again takes nothing away
        assert steady(output_dir) == steady(tmp_path / "run")
