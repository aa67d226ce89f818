"""Group sequences of like length, so that a batch runs with little padding."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return batches of positions in `lengths`, every position once, longest batch first.

    The longest of a batch times its count is at most `batch_tokens`; a longer
    sequence runs alone.  Equal lengths keep their order, so the same lengths
    always give the same batches.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(position)
        else:
            batches.append([position])
            longest = lengths[position]
    return batches
