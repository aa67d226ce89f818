"""Where the time of one step goes on a GPU: which kernels, and how long it waits between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def profile(step: Callable[[], object], top: int = 24) -> None:
    """Print which kernels the time goes to."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        step()
    rows = [(e.self_device_time_total / 1e3, e.count, e.key) for e in found.key_averages()]
    rows.sort(reverse=True)
    print(f"kernels, {sum(t for t, _, _ in rows):.1f} ms in all:")
    for spent, count, name in rows[:top]:
        print(f"  {spent:7.2f} ms {count:5} x {name[:90]}")
    rest = rows[top:]
    print(f"  {sum(t for t, _, _ in rest):7.2f} ms {sum(c for _, c, _ in rest):5} x others")
    gaps(found, top=12)


def gaps(found: Any, top: int) -> None:
    """Print how long the GPU waits between kernels, and where longest."""
    device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in found.events() if e.device_type == device]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels)
    waits = []
    end, before = spans[0][1], spans[0][2]
    for start, stop, name in spans[1:]:
        if start > end:
            waits.append(((start - end) / 1e3, (start - spans[0][0]) / 1e3, before, name))
        if stop > end:
            end, before = stop, name
    whole = (end - spans[0][0]) / 1e3
    print(f"gaps: {sum(w for w, *_ in waits):.1f} of {whole:.1f} ms, {len(spans)} kernels")
    for wait, at, one, other in sorted(waits, reverse=True)[:top]:
        print(f"  {wait:6.3f} ms at {at:6.1f} ms, after {one[:50]}, before {other[:50]}")
