"""No command calls an engine while an iterator that it returned is under way."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge_core.capture.job import run_capture
from specforge_core.capture.verify import verify_directory
from specforge_core.testing.plugin import FakeSite
from specforge_core.testing.runs import load, write_run
from specforge_core.train.run import train

pytest.importorskip("specforge_linear", reason="the linear example is not installed")

STRICT = """
    from specforge_core import hookimpl
    from specforge_core.target.engine import TransformersEngine

    calls = []

    class Strict(TransformersEngine):
        busy = False

        def capture(self, prompts, spec):
            # a generator's body would begin at the first item only
            calls.append(len(prompts))
            assert not Strict.busy, "called inside of its own iterator"
            Strict.busy = True
            return self.one_by_one(super().capture(prompts, spec))

        def one_by_one(self, found):
            yield from found
            Strict.busy = False

    @hookimpl
    def specforge_target_engine(target, device):
        return Strict.load(target, device) if target.engine == "strict" else None
"""


def test_capture_verify_and_training_call_it_one_at_a_time(
    fake_site: FakeSite, tmp_path: Path, toy_target: Path
) -> None:
    group = {"specforge.plugins": {"strict": "strict_engine"}}
    fake_site.dist("strict-engine", "0.1.0", group, module="strict_engine", source=STRICT)
    config = write_run(
        tmp_path,
        toy_target,
        conversations=9,
        target={"engine": "strict"},
        strategy={"name": "linear"},
        train={"max_steps": 9},
    )
    stored = f"data.capture_dir={tmp_path / 'capture'}"
    run, strategy = load(config, stored)
    run_capture(run, strategy)
    assert verify_directory(tmp_path / "capture", run, strategy, 3).num_recaptured == 3
    assert train(*load(config)).step == 9
    import strict_engine  # type: ignore[import-not-found]

    assert len(strict_engine.calls) > 10
