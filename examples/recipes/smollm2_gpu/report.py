"""Tables and curves of what run.py measured: `python report.py OUT` writes report.md, curves.png.

Parts that are not there yet are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DRAFTS = {"dflash": "DFlash", "eagle3": "EAGLE-3"}
SMOOTH = 0.6  # of a curve's last value, at each logged step


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def curve(run: Path) -> list[dict[str, float]]:
    """Return a run's logged steps, no measurements; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def acceptance(out: Path) -> str:
    """Return the acceptance lengths by prompt set."""
    rows, names = [], []
    for draft, title in DRAFTS.items():
        for temperature in (0, 1):
            found = load(out / f"{draft}-t{temperature}/eval/report.json")
            if found is not None:
                names = list(found["per_set"])
                lengths = [found["per_set"][name]["acceptance_length"] for name in names]
                cells = [number(v) for v in [*lengths, found["acceptance_length"]]]
                same = "" if found["lossless"] is None else found["lossless_reason"]
                rows.append([f"{title}, T={temperature}", *cells, same])
    return table(["acceptance length", *names, "all", "greedy answers"], rows) if rows else ""


def training(out: Path) -> str:
    """Return what each draft was trained on, and its speed in the same process."""
    rows = []
    for draft, title in DRAFTS.items():
        steps = curve(out / draft)
        if not steps:
            continue
        last, speed = steps[-1], load(out / f"{draft}-speed/eval/report.json") or {}
        alone, drafted = (
            speed.get(key) for key in ("baseline_tokens_per_second", "tokens_per_second")
        )
        ratio = f"{drafted / alone:.2f}x" if drafted and alone else "-"
        counts = [number(last["step"], 0), number(last["tokens"], 0), number(last["seconds"], 0)]
        rate = number(last["tokens"] / last["seconds"], 0)
        rows.append([title, *counts, rate, number(drafted, 0), number(alone, 0), ratio])
    head = ["trained", "steps", "tokens", "seconds", "tokens/s", "decoding, tokens/s", "alone"]
    return table([*head, "speed-up"], rows) if rows else ""


def parts(out: Path) -> str:
    """Return the seconds of each part, and what the answers came to."""
    found = load(out / "parts.json") or {}
    took = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in found.items())
    said = [line for line in found.get("answers", {}).get("said", []) if "tokens/s" in line]
    return "".join(f"- {line}\n" for line in [*said, f"parts: {took}"])


def smooth(values: list[float]) -> list[float]:
    """Return a running mean that starts without bias."""
    found, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        found.append(mean / weight)
    return found


def draw(out: Path, png: Path) -> None:
    """Draw loss and acceptance length in training over the tokens trained on."""
    figure = Figure(figsize=(10, 4), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2)
    keys = {"loss": "loss, each method's own", "acceptance_length": "acceptance length in training"}
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        for number_, (draft, title) in enumerate(DRAFTS.items()):
            steps = [row for row in curve(out / draft) if key in row]
            tokens = [row["tokens"] / 1e6 for row in steps]
            values = [row[key] for row in steps]
            axes.plot(tokens, values, color=f"C{number_}", alpha=0.25)
            axes.plot(tokens, smooth(values), color=f"C{number_}", label=title)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(png)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: report.py OUT")
    out = Path(sys.argv[1])
    text = "\n".join(part for part in (acceptance(out), training(out), parts(out)) if part)
    (out / "report.md").write_text(text, encoding="utf-8")
    draw(out, out / "curves.png")
    print(f"{text}\nwrote {out / 'report.md'} and {out / 'curves.png'}")


if __name__ == "__main__":
    main()
