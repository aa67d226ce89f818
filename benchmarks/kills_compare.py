"""What must be equal in a run that was killed and in one that was not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from specforge_core.capture.manifest import CaptureManifest
from specforge_core.capture.store import ShardReader
from specforge_core.drafts.checkpoint import checkpoints, find
from specforge_core.drafts.verify import verify_draft
from specforge_core.testing.runs import lines


def same_capture(one: Path, other: Path) -> list[str]:
    """Return what differs in two captures, or is left over beside the second."""
    readers = [ShardReader(path, CaptureManifest.read(path)) for path in (one, other)]
    problems = []
    rows = [{r.prompt_index(i): r[i] for i in range(len(r))} for r in readers]
    if any(len(r) != len(found) for r, found in zip(readers, rows, strict=True)):
        problems.append("a sample is there twice")
    if rows[0].keys() != rows[1].keys():
        problems.append(f"{len(rows[0])} and {len(rows[1])} samples")
    for index in rows[0].keys() & rows[1].keys():
        a, b = rows[0][index], rows[1][index]
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            problems.append(f"sample {index} differs")
    manifest = readers[1].manifest
    listed = {shard.file for shard in manifest.shards} | {"manifest.json", ".lock"}
    return problems + _left_over(other, listed | {str(manifest.token_counts)})


def same_run(one: Path, other: Path) -> list[str]:
    """Return what differs in two runs' output, or is left over in the second."""
    problems = []
    stored = []
    for path in (one, other):
        stored.append({})
        for file in sorted(find(path).glob("*.safetensors")):
            # a name occurs in the file of each rank
            stored[-1] |= {(file.name, name): v for name, v in load_file(file).items()}
    if stored[0].keys() != stored[1].keys():
        problems.append("other tensors")
    elif not all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0]):
        problems.append("weights or optimizer differ")
    steady = [
        [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per"))}
            for row in lines(path)
        ]
        for path in (one, other)
    ]
    if steady[0] != steady[1]:
        problems.append("metrics.jsonl differs")
    verify_draft(other)
    steps = [[path.name for path in checkpoints(run)] for run in (one, other)]
    if len(steps[0]) != len(steps[1]) or steps[0][-1] != steps[1][-1]:
        problems.append(f"checkpoints {steps[1]}, not {steps[0]}")
    # ranks whose launcher is killed save where they are, so the older ones may be of other steps
    expected = {str(path.relative_to(one)) for path in one.rglob("*")}
    newest = {name for name in expected if steps[0][-1] in name}
    expected |= {name.replace(steps[0][-1], step) for name in newest for step in steps[1]}
    return problems + _left_over(other, expected)


def _left_over(path: Path, expected: set[str]) -> list[str]:
    found = {str(file.relative_to(path)) for file in path.rglob("*")}
    return [f"left over: {name}" for name in sorted(found - expected)]
