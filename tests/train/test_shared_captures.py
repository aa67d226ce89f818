"""Methods that share a capture, and weights that another method begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.capture.job import run_capture
from specforge_core.capture.verify import verify_directory
from specforge_core.drafts.load import restore
from specforge_core.errors import CaptureError, CheckpointError, ConfigError
from specforge_core.testing.runs import load, losses
from specforge_core.train.run import train

from ..runs import WIDE, linear_run, weights

pytest.importorskip("specforge_linear", reason="the linear example is not installed")


@pytest.fixture
def config(tmp_path: Path, toy_target: Path) -> Path:
    return linear_run(tmp_path, toy_target)


VARIANT = """
    from specforge_core import hookimpl
    from specforge_linear import (
        specforge_adapter, specforge_config, specforge_draft, specforge_train_step)
    """


def test_a_second_strategy_that_asks_for_the_same_trains_on_one_capture(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy("variant", VARIANT)
    offline = f"data.capture_dir={tmp_path / 'capture'}"
    run_capture(*load(config, offline))
    train(*load(config, offline))
    other = f"output_dir={tmp_path / 'other'}"
    train(*load(config, offline, other, "strategy.name=variant"))
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    with pytest.raises(CaptureError, match=r"captured layers: \[4\] in the capture, \[2\] in this"):
        train(*load(config, offline, other, "strategy.name=variant", "strategy.layer=2"))


MORE = """
    from dataclasses import dataclass, replace
    from specforge_core import hookimpl
    from specforge_core.types import Field
    import specforge_linear
    from specforge_linear import specforge_config, specforge_draft, specforge_train_step
    @dataclass
    class Adapter:
        less: specforge_linear.LinearAdapter
        @property
        def spec(self):
            spec = self.less.spec
            fields = {**spec.fields, "next": Field(shape=(None,), dtype="int64")}
            return replace(spec, fields=fields, next_tokens=True, logsumexp=True,
                           final="post_norm", version=spec.version + 6)
        def __call__(self, capture):
            return {**self.less(capture), "next": capture.next_tokens}
    @hookimpl
    def specforge_adapter(config, target):
        return Adapter(specforge_linear.specforge_adapter(config, target))
    """


@pytest.mark.slow
def test_a_strategy_that_asks_for_less_trains_on_a_capture_of_more(
    config: Path, tmp_path: Path, env: Any
) -> None:
    env.strategy("more", MORE)
    train(*load(config))
    large, small = (f"data.capture_dir={tmp_path / name}" for name in ("large", "small"))
    more, other = "strategy.name=more", f"output_dir={tmp_path / 'other'}"
    run_capture(*load(config, large, more))
    train(*load(config, large, other))
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    run, strategy = load(config)
    restore(run, strategy, tmp_path / "other")  # what it reads is what online training gave it
    report = verify_directory(tmp_path / "large", run, strategy, 2)
    assert report.num_recaptured == 2
    run_capture(*load(config, small))
    with pytest.raises(CaptureError, match="target's next tokens: False in the capture, True in"):
        train(*load(config, small, more))


@pytest.mark.slow
def test_a_run_may_begin_with_another_strategys_weights_if_they_fit(
    config: Path, tmp_path: Path, env: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    env.strategy("variant", VARIANT)
    train(*load(config))
    variant, more = "strategy.name=variant", f"output_dir={tmp_path / 'more'}"
    begun = f"train.init_from={tmp_path / 'run'}"
    train(*load(config, variant, more, begun, "train.learning_rate=1e-9"))
    told = f"starting from the weights of {tmp_path / 'run/checkpoints'}/step-"
    assert told in capsys.readouterr().err.replace("\n", "")
    ours, theirs = weights(tmp_path / "more"), weights(tmp_path / "run")
    for name in theirs:
        if name.startswith("model."):
            torch.testing.assert_close(ours[name], theirs[name])
    with pytest.raises(ConfigError, match=r"already began from .* and would be resumed"):
        train(*load(config, variant, more, "train.init_from=elsewhere"))
    env.strategy("wide", WIDE)
    with pytest.raises(CheckpointError, match=r"model\.weight has shape \[260, 32\] in it"):
        train(*load(config, "strategy.name=wide", f"output_dir={tmp_path / 'wide'}", begun))
