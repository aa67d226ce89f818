"""What a capture is of: made once from a run, compared whenever a capture is used."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..errors import CaptureError
from ..packages import version
from ..plugins import CORE
from ..strategy import Strategy
from ..target.fingerprint import target_fingerprint
from ..target.tokenizer import template_fingerprint, template_options, tokenizer_fingerprint
from ..types import CaptureSpec, TargetInfo
from .manifest import CaptureIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AGAIN = "or capture again into another data.capture_dir"
# what methods ask for more or less of: those that ask for less train on what the others captured
ASKED = (
    "Capture again with this run's config into another data.capture_dir: methods that ask for "
    "less of the same layers train on it, too. Or set the strategy's options to the capture's"
)
# field -> how it is called in the error, and what can be done about it
MUST_AGREE = {
    "spec_version": (
        "version of the strategy's capture format",
        f"Install the strategy version that captured, {AGAIN}",
    ),
    "layers": ("captured layers", f"Set the strategy's layers to those of the capture, {AGAIN}"),
    "final": ("final hidden state", ASKED),
    "next_tokens": ("target's next tokens", ASKED),
    "logsumexp": ("target's log-sum-exp", ASKED),
    "fields": ("stored fields", ASKED),
    "hidden_size": ("target's hidden size", f"Set target.path to the captured one, {AGAIN}"),
    "num_layers": ("target's layers", f"Set target.path to the captured one, {AGAIN}"),
    "vocab_size": ("target's vocabulary", f"Set target.path to the captured one, {AGAIN}"),
    "target_fingerprint": (
        "target's weights or config",
        f"Set target.path and target.revision to the captured ones, {AGAIN}",
    ),
    "tokenizer_fingerprint": ("tokenizer", f"Use the tokenizer of the capture, {AGAIN}"),
    "chat_template_fingerprint": (
        "chat template or data.chat_template_kwargs",
        f"Use the template, its arguments and data.now of the capture, {AGAIN}",
    ),
    "max_length": ("data.max_length", f"Set data.max_length to the capture's, {AGAIN}"),
}
# field -> whether a capture that has the first is of use to a run that asks for the second
HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "fields": lambda have, want: want.items() <= have.items(),
    "layers": lambda have, want: want in (have, ()),  # (): the final state is read alone
    "final": lambda have, want: want in (have, "none"),
    "next_tokens": operator.ge,
    "logsumexp": operator.ge,
    "max_length": operator.ge,
}
SPEC = ("fields", "layers", "final", "next_tokens", "logsumexp")  # of a CaptureSpec, too


def capture_identity(
    run: RunConfig,
    strategy: Strategy,
    info: TargetInfo,
    spec: CaptureSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> CaptureIdentity:
    """Return the identity of what this run captures; reads a little of the target's weights."""
    return CaptureIdentity(
        strategy=strategy.name,
        strategy_package=strategy.package,
        core_version=version(CORE),
        spec_version=spec.version,
        layers=spec.layers,
        final=spec.final,
        next_tokens=spec.next_tokens,
        logsumexp=spec.logsumexp,
        fields={name: (field.shape, field.dtype) for name, field in spec.fields.items()},
        target=info.name_or_path,
        target_revision=info.revision,
        target_fingerprint=target_fingerprint(info),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        chat_template_fingerprint=template_fingerprint(tokenizer, template_options(run.data)),
        hidden_size=info.hidden_size,
        num_layers=info.num_layers,
        vocab_size=info.vocab_size,
        max_length=run.data.max_length,
    )


def check_identity(
    found: CaptureIdentity, expected: CaptureIdentity, directory: Path, *, resume: bool = False
) -> None:
    """Raise CaptureError when a capture is not what the run expects, naming fields and values.

    A run may train on more than it needs: longer samples are cut, and fields that it does not ask
    for are left out.  It must not `resume` a capture of anything else.
    """
    wrong = [name for name in MUST_AGREE if getattr(found, name) != getattr(expected, name)]
    if not resume:
        wrong = [name for name in wrong if not _covers(name, found, expected)]
    if not wrong:
        return
    lines = "".join(
        f"\n  {MUST_AGREE[name][0]}: {_show(found, name, expected)} in the capture, "
        f"{_show(expected, name, found)} in this run"
        for name in wrong
    )
    raise CaptureError(
        f"the capture in {directory} does not fit this run:{lines}\n{MUST_AGREE[wrong[0]][1]}"
    )


def covers(wide: CaptureSpec, spec: CaptureSpec) -> bool:
    """Say whether a capture of `wide` holds all that `spec` asks for, of whichever method."""
    return all(HOLDS[name](getattr(wide, name), getattr(spec, name)) for name in SPEC)


def _covers(name: str, found: CaptureIdentity, expected: CaptureIdentity) -> bool:
    """Say whether a capture holds all that a run asks for under `name`, and more."""
    if name == "spec_version":  # each strategy counts its own
        return found.strategy != expected.strategy
    return name in HOLDS and HOLDS[name](getattr(found, name), getattr(expected, name))


def _show(identity: CaptureIdentity, name: str, other: CaptureIdentity) -> str:
    if name != "fields":
        return identity.shown(name, other)
    own = {key: field for key, field in identity.fields.items() if field != other.fields.get(key)}
    return str({key: f"{dtype} {list(shape)}" for key, (shape, dtype) in own.items()})
