"""What the stages measured, as one table and one picture: table.md, table.json, compare.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs import note
from matplotlib.figure import Figure
from report import curve, load, number, smooth, table
from safetensors import safe_open

from specforge_core.drafts.checkpoint import find
from specforge_core.text import cut

REASON = 300  # characters of why a draft is not served
STAGES = ("answers", "capture", "train", "eval", "speed", "pace", "serve")


def write_results(out: Path) -> None:
    """Write the three files from what there is."""
    methods = [path.stem for path in sorted((out / "done/train").glob("*.json"))]
    rows = {method: measured(out, method) for method in methods}
    names = prompt_sets(rows)
    found = {"methods": rows, "notes": notes(out, rows)}
    text = f"{as_table(rows, names)}\n" + "".join(f"- {line}\n" for line in found["notes"])
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(out, rows, names, out / "compare.png")
    print(f"{text}\nwrote {out / 'table.md'}, {out / 'table.json'} and {out / 'compare.png'}")


def measured(out: Path, method: str) -> dict[str, Any]:
    """Return what is known of one method.  None: not measured."""
    found: dict[str, Any] = {"parameters": parameters(out / "train" / method)}
    steps = curve(out / "train" / method)
    found |= {key: steps[-1][key] if steps else None for key in ("step", "tokens", "seconds")}
    alone = note(out / f"done/train/{method}.json")["at_once"] == 1
    found["train_tokens_per_second"] = pace(out / ("train" if alone else "pace") / method)
    for temperature in (0, 1):
        report = load(out / f"eval/{method}-t{temperature}/eval/report.json")
        found[f"t{temperature}"] = report and {
            **{name: part["acceptance_length"] for name, part in report["per_set"].items()},
            "all": report["acceptance_length"],
        }
    greedy = load(out / f"eval/{method}-t0/eval/report.json") or {}
    quick = load(out / f"speed/{method}/eval/report.json") or greedy
    found["drafted_tokens"] = greedy.get("max_draft_tokens")
    found["lossless"] = quick.get("lossless_reason")
    found["device"] = greedy.get("device")
    compared = quick.get("baseline_tokens_per_second") is not None  # so it was alone
    found["tokens_per_second"] = quick.get("tokens_per_second") if compared else None
    found["target_tokens_per_second"] = quick.get("baseline_tokens_per_second")
    found["served"] = load(out / f"served/{method}.json")
    return found


def parameters(run: Path) -> int | None:
    """Return how many weights a draft has of its own: what its checkpoint holds of the model."""
    total = 0
    for path in sorted(find(run).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in filter(lambda name: name.startswith("model."), file.keys()):
                part = file.get_slice(name)
                size = 1
                for length in part.get_shape():
                    size *= length
                total += size if part.get_dtype() in ("F32", "BF16", "F16") else 0
    return total


def pace(run: Path) -> float | None:
    """Return a training's tokens/s without its first quarter, in which kernels are compiled."""
    steps = curve(run)
    if len(steps) < 2:
        return steps[0]["tokens"] / steps[0]["seconds"] if steps else None
    first = steps[(len(steps) - 1) // 4]
    tokens, seconds = (steps[-1][key] - first[key] for key in ("tokens", "seconds"))
    return tokens / seconds if seconds else None


def prompt_sets(rows: dict[str, dict[str, Any]]) -> list[str]:
    found = (row["t0"] or row["t1"] for row in rows.values())
    return list(next((sets for sets in found if sets), {}))


def as_table(rows: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Return the table in markdown."""
    head = ["method", "drafted", "parameters", *(f"T=0 {name}" for name in names)]
    head += [*(f"T=1 {name}" for name in names), "training, tokens/s", "loop, tokens/s"]
    head += ["SGLang", "SGLang, tokens/s"]
    lines = []
    for method, row in rows.items():
        size = row["parameters"]
        cells = [method, number(row["drafted_tokens"], 0), f"{number(size / 1e6, 1)} M"]
        for key in ("t0", "t1"):
            cells += [number((row[key] or {}).get(name)) for name in names]
        cells += [number(row[k], 0) for k in ("train_tokens_per_second", "tokens_per_second")]
        served = row["served"] or {}
        lines.append(
            [
                *cells,
                number(served.get("acceptance_length")),
                number(served.get("tokens_per_second"), 0),
            ]
        )
    speeds = [row["target_tokens_per_second"] for row in rows.values()]
    alone = [speed for speed in speeds if speed]
    if alone:
        mean = number(sum(alone) / len(alone), 0)
        lines.append(["no draft", "0", "0", *["1.00"] * 2 * len(names), "-", mean, "1.00", "-"])
    return table(head, lines)


def notes(out: Path, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the table's numbers were measured on, a line each."""
    told = []
    for method, row in rows.items():
        served = row["served"]
        reason = served.get("not_served") if served else "no SGLang was given"
        reason = reason and cut(" ".join(reason.split()), REASON)  # OUT/served has the whole of it
        told.append(
            f"{method}: {number(row['step'], 0)} steps, {number(row['tokens'], 0)} tokens in "
            f"{number(row['seconds'], 0)} s; greedy: {row['lossless'] or 'not compared'}; "
            + (f"not served: {reason}" if reason else f"served by {served['engine']}")
        )
    if devices := sorted({row["device"] for row in rows.values() if row["device"]}):
        told.append(f"decoded on {', '.join(devices)}")
    for stage in STAGES:
        done = [note(path) for path in sorted((out / "done" / stage).glob("*.json"))]
        if done:
            seconds = sum(job["seconds"] for job in done)
            most = max(job["at_once"] for job in done)
            told.append(f"{stage}: {len(done)} processes, {seconds:.0f} s in sum, {most} at once")
    return told


ABOVE: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}  # hides no bar


def draw(out: Path, rows: dict[str, dict[str, Any]], names: list[str], png: Path) -> None:
    """Draw acceptance by prompt set at both temperatures, and its growth in training."""
    figure = Figure(figsize=(13, 4.2), dpi=140, layout="constrained")
    *panels, growth = figure.subplots(1, 3)
    for axes, (key, title) in zip(panels, {"t0": "T=0", "t1": "T=1"}.items(), strict=True):
        for place, name in enumerate(names):
            lengths = [(row[key] or {}).get(name) or 0.0 for row in rows.values()]
            height = 0.8 / len(names)
            ys = [i + (place - (len(names) - 1) / 2) * height for i in range(len(rows))]
            axes.barh(ys, lengths, height, label=name, color=f"C{place}")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(f"acceptance length, {title}")
        axes.legend(frameon=False, fontsize="small", ncols=4, **ABOVE)
    for place, method in enumerate(rows):
        steps = [row for row in curve(out / "train" / method) if "acceptance_length" in row]
        tokens = [row["tokens"] / 1e6 for row in steps]
        values = smooth([row["acceptance_length"] for row in steps])
        growth.plot(tokens, values, color=f"C{place}", label=method)
    growth.set_xlabel("million tokens")
    growth.set_ylabel("acceptance length in training, each method's own")
    growth.legend(frameon=False, fontsize="small")
    for axes in (*panels, growth):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)
