"""What drafts' confidences came to: recorded in eval, and calibrated by them.

Shapes: N drafts, D tokens of a draft.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from specforge_core.errors import DataError

BINS = 15
TEMPERATURES = torch.logspace(-1, 1, 41, dtype=torch.float64)


def append(path: Path, logits: list[float], accepted: int) -> None:
    """Add one draft to a record, in one write: several may write at once."""
    line = json.dumps({"logits": logits, "accepted": accepted}) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as exc:
        raise DataError(
            f"cannot write to strategy.record_confidence={path}: {exc.strerror}"
        ) from exc


def read(path: Path, draft_tokens: int) -> tuple[Tensor, Tensor]:
    """Return a record: logits [N, D] float64, and how many tokens were accepted [N] int64.

    Raises DataError where it is none, of drafts of that many tokens.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        logits = torch.tensor([row["logits"] for row in rows], dtype=torch.float64)
        accepted = torch.tensor([row["accepted"] for row in rows], dtype=torch.int64)
    except (OSError, ValueError, TypeError, LookupError) as exc:
        raise DataError(
            f"strategy.calibration={path} cannot be read: {exc}. Try: specforge eval ... "
            "strategy.record_confidence=FILE, with a file that does not exist yet"
        ) from exc
    if logits.shape != (len(rows), draft_tokens) or not rows or not logits.isfinite().all():
        raise DataError(
            f"strategy.calibration={path} holds {len(rows)} drafts of shape "
            f"{list(logits.shape[1:])}, where drafts of {draft_tokens} finite numbers are "
            "needed. Record it with this draft"
        )
    return logits, accepted


@dataclass(slots=True)
class Calibration:
    """One temperature for each place of a draft, and the errors without and with them.

    The fields are those of the JSON that SGLang reads: --speculative-dspark-confidence-sts-path.
    """

    num_samples: int  # drafts
    temperatures: list[float] = field(default_factory=list)
    ece_before: list[float] = field(default_factory=list)
    ece_after: list[float] = field(default_factory=list)


def calibrate(logits: Tensor, accepted: Tensor) -> Calibration:
    """Fit temperatures to a record, place by place: sequential temperature scaling.

    The probability that the first k tokens of a draft are all kept is taken for the product of
    sigmoid(logit / temperature) over them.  At each place the temperature of `TEMPERATURES` is
    chosen that makes that product's expected calibration error least, those before it fixed.
    """
    plain = fitted = torch.ones(len(logits), dtype=torch.float64)
    out = Calibration(len(plain))
    for place, logit in enumerate(logits.unbind(1)):
        kept = (accepted > place).double()
        plain = plain * torch.sigmoid(logit)
        tried = [fitted * torch.sigmoid(logit / t) for t in TEMPERATURES]
        errors = [calibration_error(survival, kept) for survival in tried]
        best = min(range(len(errors)), key=errors.__getitem__)
        fitted = tried[best]
        out.temperatures.append(float(TEMPERATURES[best]))
        out.ece_before.append(calibration_error(plain, kept))
        out.ece_after.append(errors[best])
    return out


def calibration_error(probabilities: Tensor, happened: Tensor) -> float:
    """Return the expected calibration error of `probabilities` [N], in `BINS` equal bins.

    The difference of mean probability and frequency in each bin, weighted by its share of N.
    """
    bins = (probabilities * BINS).long().clamp(0, BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, probabilities - happened)
    return float(apart.abs().sum()) / len(probabilities)
