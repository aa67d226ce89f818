from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge_core.errors import CheckpointError
from specforge_core.evaluate.compare import figure_of
from specforge_core.evaluate.decode import Answer, DecodeStats
from specforge_core.evaluate.plot import plot_acceptance, plot_loss
from specforge_core.evaluate.report import PromptResult, Setup, summarize

PNG = b"\x89PNG\r\n\x1a\n"


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def acceptance(tmp_path: Path, name: str, *stats: DecodeStats) -> bytes:
    setup = Setup("mine", "models/tiny", 0.0, "float32", "cpu", 16, 3, 1)
    sets = {
        f"set {i}": [PromptResult("p:1", Answer((1,), found), None, None)]
        for i, found in enumerate(stats)
    }
    png = tmp_path / name
    plot_acceptance(summarize(setup, sets), png)
    assert size(png) == (980, 588)
    assert [path.name for path in tmp_path.glob(".*")] == []
    return png.read_bytes()


def test_acceptance_is_drawn_for_every_set(tmp_path: Path) -> None:
    one = DecodeStats(10, 25, (10, 10, 10), (8, 5, 2), 10, 0.5)
    two = DecodeStats(10, 15, (10, 10, 10), (3, 1, 1), 10, 0.5)
    both = acceptance(tmp_path, "both.png", one, two)
    assert both != acceptance(tmp_path, "one.png", one)
    assert both != acceptance(tmp_path, "other.png", two, one)


def test_acceptance_of_nothing_is_an_empty_plot(tmp_path: Path) -> None:
    acceptance(tmp_path, "none.png", DecodeStats())


def metrics(tmp_path: Path, *rows: dict[str, float]) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_curve_is_drawn(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 5 / i} for i in range(1, 50)]
    plot_loss(metrics(tmp_path, *rows, {"step": 50, "seconds": 1.0}), tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (980, 588)


def test_a_run_without_losses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl holds no losses yet"):
        plot_loss(metrics(tmp_path), tmp_path / "loss.png")
    with pytest.raises(CheckpointError, match=r"cannot be read.*Try: specforge train"):
        plot_loss(tmp_path / "missing.jsonl", tmp_path / "loss.png")


def test_no_two_lines_of_a_run_look_alike(tmp_path: Path) -> None:
    sets = {f"acceptance/length/{name}": 1.5 for name in ("gsm", "humaneval", "mt_bench")}
    row = {"acceptance_length": 1.2, "validation/acceptance_length": 1.1, "acceptance/length": 1.3}
    metrics(tmp_path, {"step": 1, **row, **sets})
    lines = figure_of([tmp_path]).axes[0].lines
    assert len(lines) == 6
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 6  # type: ignore[attr-defined]
