"""Group sequences of like length, so that a batch runs with little padding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

# Of a device: seconds until a layer is launched, operations a second, and tokens below which the
# weights take longer to read than to use.  Measured on an H200 (36 layers of 8 G parameters: 40 ms,
# 490 TFLOP/s) and on two cores of a CPU; only how sequences are cut into batches depends on them.
DEVICES = {"cuda": (1.1e-3, 5e14, 128), "cpu": (1e-4, 4e11, 64)}


def least_tokens(device: str, layers: int, parameters: int) -> int:
    """Return the tokens of a pass that takes no longer than one of fewer tokens."""
    seconds, rate, tokens = DEVICES.get(device, DEVICES["cuda"])
    return tokens + round(layers * seconds * rate / (2 * parameters))


def rope_turn(config: Any) -> int:
    """Return the length above which a sequence turns all those of its batch by other angles.

    So one that is longer may not run with others.  0 where there is no such rope.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    each = (rope, *(inner for inner in rope.values() if isinstance(inner, dict)))
    turns = [
        r["original_max_position_embeddings"] for r in each if r.get("rope_type") == "longrope"
    ]
    if any(r.get("rope_type") == "dynamic" for r in each):
        turns.append(config.max_position_embeddings)
    return max(map(int, turns), default=0)


def group_by_length(lengths: Sequence[int], batch_tokens: int, least: int) -> list[list[int]]:
    """Return batches of positions in `lengths`, every position once, longest batch first.

    The longest of a batch times its count is at most `batch_tokens`; a longer sequence runs
    alone.  Of all such ways to cut the sequences, ordered by length, this is the one with the
    fewest padded tokens, where a batch counts for `least` if it has fewer.  Equal lengths keep
    their order, so the same lengths always give the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost, start = [0], [0]  # of the best batches of the first so many, and where their last begins
    for end in range(1, len(order) + 1):
        ways: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            padded = lengths[order[begin]] * (end - begin)
            if padded > batch_tokens and ways:
                break
            ways.append((cost[begin] + max(padded, least), begin))
        fewest, begin = min(ways)  # of equals the one with fewer batches
        cost.append(fewest)
        start.append(begin)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


def fill_in_order(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return batches of positions in `lengths`, every position once, for rows without padding.

    In order of length, longest first, as few batches as there can be with at most `batch_tokens`
    each, and as even as they can be; a longer sequence runs alone.  Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def filled(limit: int) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for index in order:
            if lengths[index] > room:
                batches.append([])
                room = limit
            batches[-1].append(index)
            room -= lengths[index]
        return batches

    fewest = len(filled(batch_tokens))
    limits = range(1, batch_tokens + 1)
    return filled(limits[bisect_left(limits, True, key=lambda n: len(filled(n)) <= fewest)])
