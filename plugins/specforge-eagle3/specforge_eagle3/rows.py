"""One batch as the objective sees it: tokens behind each other, labels, and who predicts them.

Row t of step i reads the feature of token t and the embedding of token t+1+i; its label is
the target's distribution at u = t+1+i, of token t+2+i.  So one label u is predicted by a row
of every step, u-1-i of step i.  Shapes: N tokens of all documents, D documents, U labels,
R steps, B and S rows and columns of the batch, H hidden size, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.errors import CaptureError
from specforge_core.types import Batch

from .adapter import DOCUMENTS, trained_labels

FIELDS = ("input_ids", "loss_mask", "hidden_states", "final", "target_argmax")


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy to the device without waiting for it."""
    if torch.device(device).type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


class Documents:
    """Where each document begins and ends in a row of N tokens.

    No dataclass: FSDP's mixed precision casts the tensors in those.
    """

    def __init__(self, lengths: list[int], device: torch.device | str) -> None:
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        sizes = torch.tensor(lengths, dtype=torch.int64)
        ends = sizes.cumsum(0)
        bounds = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        starts = (ends - sizes).repeat_interleave(sizes)
        self.bounds = upload(bounds, device)  # [D + 1]
        self.positions = upload(torch.arange(len(starts)) - starts, device)  # [N], in the document
        self._visible: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """[N, N] bool: which tokens of its document a token sees; for the eager path only."""
        if self._visible is None:
            places = torch.arange(len(self.positions), device=self.positions.device)
            starts = places - self.positions
            self._visible = (starts[:, None] == starts) & (places[:, None] >= places)
        return self._visible


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch without its padding."""

    documents: Documents
    batch: Batch  # fields [N, ...]
    labels: Tensor  # [U] int64, ascending: the places that are labels
    students: Tensor  # [U, R] int64, the row that predicts the label at each step
    present: Tensor  # [U, R] bool: that row is in the label's document; else `students` is 0
    supervised: Tensor  # [N] bool: rows whose label of step 0 is supervised, drafted or not
    starts: Tensor  # [N] bool: of these, the ones a draft starts from within an answer
    answers: Tensor  # [U] bool: the label's token is supervised, whatever the mask is on

    @classmethod
    def build(cls, batch: Batch, t2d: Tensor, mask_on: str, steps: int) -> Rows:
        """Drop the padding; find the labels that are supervised and in the draft vocabulary.

        The device is waited for once: what is long is queued behind this, so all that decides
        about sizes and places is read together and worked out on the CPU.  Raises CaptureError
        when the batch lacks a field.
        """
        if missing := [name for name in FIELDS if name not in batch]:
            raise CaptureError(
                f"the captured samples have no {', '.join(missing)}, which EAGLE-3 trains on. "
                "Capture again into an empty directory: specforge capture -c RUN.yaml"
            )
        ids = batch["input_ids"]
        numbers = batch.get(DOCUMENTS, torch.ones_like(ids))
        drafted = t2d[batch["target_argmax"]]
        read = torch.stack([numbers, batch["loss_mask"].long(), drafted.long()]).cpu()
        # the same number in two rows of the batch is two documents
        read[0] += torch.arange(len(ids))[:, None] * (ids.shape[1] + 1) * (read[0] > 0)
        unique, loss_mask, drafted = read.flatten(1)
        flat = {name: batch[name].flatten(0, 1) for name in FIELDS}
        kept = unique.nonzero().squeeze(1)
        if len(kept) < len(unique):
            unique, loss_mask, drafted = unique[kept], loss_mask[kept], drafted[kept]
            places = upload(kept, ids.device)
            flat = {name: values[places] for name, values in flat.items()}
        _, counts = unique.unique_consecutive(return_counts=True)

        asked = trained_labels(loss_mask, mask_on, unique)
        labels = (asked & drafted.bool()).nonzero().squeeze(1)
        back = 1 + torch.arange(steps)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        present = (labels - starts[labels])[:, None] >= back
        students = (labels[:, None] - back).masked_fill(~present, 0)
        supervised = torch.zeros_like(asked)
        supervised[:-1] = asked[1:]
        starts = torch.zeros_like(asked)
        within = trained_labels(loss_mask, "label", unique)
        starts[:-1] = (asked & within & loss_mask.bool())[1:]
        own = (labels, students, present, supervised, starts, within[labels])
        found = (upload(x, ids.device) for x in own)
        return cls(Documents(counts.tolist(), ids.device), flat, *found)

    def prefix_hits(self, hits: Tensor) -> Tensor:
        """Return how many steps from the first on each row predicted right, [N] int64.

        `hits` [U, R] are of the labels; what is no label (not supervised, not in the draft
        vocabulary) is a miss.
        """
        count = len(self.supervised)
        by_row = torch.zeros(hits.shape[1], count + 1, dtype=torch.int64, device=hits.device)
        column = self.students.masked_fill(~self.present, count)
        step = torch.arange(hits.shape[1], device=hits.device).expand_as(column)
        by_row[step, column] = (hits & self.present).long()
        return by_row[:, :count].cumprod(dim=0).sum(dim=0)
