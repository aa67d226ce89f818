"""Samples/s of a run's data: captured, captured and kept, read again, and read from shards.

python benchmarks/state_cache.py [-c examples/quickstart/run.yaml] [KEY=VALUE ...]

Only the data: what a training step waits for.  "again" is an epoch after the first one under
`capture.cache` with room for all; its floor is "offline", the same samples of a capture on the same
disk, opened anew, so that each sample is compared with its checksum as the cache does.  Both are
the fastest of ROUNDS: what else runs on the machine is no part of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

from specforge_core.batches.loader import OnlineSource, Share
from specforge_core.capture.job import run_capture
from specforge_core.cpu import use_threads
from specforge_core.load import load_config
from specforge_core.train.feed import open_feed

ROUNDS = 5


def rates(config: Path, overrides: list[str], epochs: int) -> list[float]:
    """Return the tokens per second of each epoch of a run's source."""
    run, strategy = load_config(config, overrides)
    feed = open_feed(run, strategy, Share(0, 1, run.train.seed))
    found = []
    try:
        assert feed.data.num_samples is not None
        samples = feed.source.samples(0)
        for _ in range(epochs):
            started, tokens = time.perf_counter(), 0
            for placed in islice(samples, feed.data.num_samples):
                if placed.sample is not None:
                    tokens += len(placed.sample["input_ids"])
            found.append(tokens / (time.perf_counter() - started))
        if isinstance(feed.source, OnlineSource) and (cache := feed.source.cache) is not None:
            print(f"cache: {cache.hits} found, {cache.misses} not")
    finally:
        feed.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", type=Path, default=Path("examples/quickstart/run.yaml"))
    parser.add_argument("overrides", nargs="*", default=["data.limit=64"])
    arguments = parser.parse_args()
    print(f"{use_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        more = arguments.overrides
        (plain,) = rates(arguments.config, more, 1)
        kept = [f"capture.cache.dir={folder}/kept", "capture.cache.max_bytes=1000000000000"]
        first, *later = rates(arguments.config, [*more, *kept], 1 + ROUNDS)
        again = max(later)
        stored = [*more, f"data.capture_dir={folder}/capture"]
        run_capture(*load_config(arguments.config, stored))
        offline = max(rates(arguments.config, stored, 1)[0] for _ in range(ROUNDS))
    for name, rate in (
        ("captured", plain),
        ("captured and kept", first),
        ("again", again),
        ("offline", offline),
    ):
        print(f"{name:<20} {rate:10,.0f} tokens/s  {rate / offline:6.1%} of offline")


if __name__ == "__main__":
    main()
