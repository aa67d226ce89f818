"""What SGLang's model runner calls: the taps are set on a loaded model, and see each batch."""

from __future__ import annotations

from typing import Any

from .sender import Sender
from .taps import Taps

ATTRIBUTE = "_specforge_taps"

_sender: Sender | None = None


def after_load_model(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    """Install the hooks on the model that a runner has just loaded."""
    global _sender
    if getattr(runner, "is_draft_worker", False):
        return
    _sender = _sender or Sender()
    taps = Taps(
        runner.model,
        int(runner.model_config.num_hidden_layers),
        int(getattr(runner, "tp_rank", 0)) == 0,
        _sender,
        whole=int(getattr(runner, "tp_size", 1)) == 1,
    )
    setattr(runner, ATTRIBUTE, taps)


def before_forward(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Let the hooks see the batch that a runner is about to run."""
    taps = getattr(runner, ATTRIBUTE, None)
    batch = args[0] if args else kwargs.get("forward_batch")
    if taps is not None and batch is not None:
        taps.begin(batch)
