"""One batch as the objective sees it: tokens behind each other, labels, and who predicts them.

Row t of step i reads the feature of token t and the embedding of token t+1+i; its label is
the target's distribution at u = t+1+i, of token t+2+i.  So one label u is predicted by a row
of every step, u-1-i of step i.  Shapes: N tokens of all documents, D documents, U labels,
R steps, B and S rows and columns of the batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.batches.collate import flat_rows, pack
from specforge_core.batches.loader import to_device
from specforge_core.errors import CaptureError
from specforge_core.types import DOCUMENT_IDS, POSITION_IDS, Batch, Sample

from .adapter import trained_labels

FIELDS = (
    *("input_ids", "loss_mask", "hidden_states", "final", "target_argmax", "target_logsumexp"),
)


class Documents:
    """Where each document is in a row of N tokens.

    No dataclass: FSDP's mixed precision casts the tensors in those.
    """

    def __init__(self, ids: Tensor, positions: Tensor, bounds: Tensor, longest: int) -> None:
        self.ids = ids  # [N], the same in one document
        self.positions = positions  # [N], in the document
        self.bounds = bounds  # [D + 1] int32
        self.longest = longest
        self._visible: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Documents:
        ids, positions = batch[DOCUMENT_IDS][0], batch[POSITION_IDS][0]
        return cls(ids, positions, batch["bounds"], len(batch["longest"]))

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> Documents:
        """Return documents of these lengths behind each other."""
        batch = pack([{"input_ids": torch.zeros(n)} for n in lengths], ("input_ids",))
        batch |= document_bounds(batch[DOCUMENT_IDS][0])
        return cls.of({name: tensor.to(device) for name, tensor in batch.items()})

    @property
    def visible(self) -> Tensor:
        """[N, N] bool: which tokens of its document a token sees; for the eager path only."""
        if self._visible is None:
            self._visible = (self.ids[:, None] == self.ids).tril_()
        return self._visible


def document_bounds(documents: Tensor) -> Batch:
    """Return where the documents [N] begin and end: `bounds` [D + 1], and `longest` [length, 0].

    Kernels want the length of the longest as a number.  A shape carries it to the step, which
    would have to wait for the device to read it back.
    """
    _, counts = torch.unique_consecutive(documents, return_counts=True)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return {"bounds": bounds, "longest": torch.empty(max(counts.tolist(), default=0), 0)}


@dataclass(frozen=True, slots=True)
class PackedCollate:
    """Puts fields of a batch's samples behind each other, and finds what is trained."""

    find: Callable[[Batch], Batch]
    names: Sequence[str] = FIELDS
    method: str = "EAGLE-3"

    def __call__(self, samples: Sequence[Sample], /) -> Batch:
        """Return what `find` does.  Raises CaptureError when the samples lack a field."""
        if missing := [name for name in self.names if any(name not in s for s in samples)]:
            raise CaptureError(
                f"the captured samples have no {', '.join(missing)}, which {self.method} trains "
                "on. Capture again into an empty directory: specforge capture -c RUN.yaml"
            )
        fields = [{name: sample[name] for name in self.names} for sample in samples]
        return self.find(pack(fields, self.names))


class Tokens:
    """A packed or padded batch without its padding, N tokens, and which positions are labels."""

    def __init__(self, batch: Batch, names: Sequence[str], mask_on: str) -> None:
        self.flat, self.documents = flat_rows(batch, (*names, POSITION_IDS))
        loss_mask = self.flat["loss_mask"]
        self.asked = trained_labels(loss_mask, mask_on, self.documents)
        self.within = trained_labels(loss_mask, "label", self.documents)
        self.starts = torch.zeros_like(self.asked)  # the row starts a draft within an answer
        self.starts[:-1] = (self.asked & self.within & loss_mask.bool())[1:]

    def by_token(self, **more: Tensor) -> Batch:
        """Return what a batch has by token, [1, N] each."""
        kept = {name: self.flat[name] for name in ("input_ids", "hidden_states", POSITION_IDS)}
        found = {**kept, DOCUMENT_IDS: self.documents, **more}
        return {name: tensor[None] for name, tensor in found.items()}

    def by_label(self, labels: Tensor) -> Batch:
        """Return final, choices, logsumexp and answers of labels [U]: see `label_rows`."""
        final = self.flat["final"]
        return {
            "final": final[to_device({"labels": labels}, final.device)["labels"]],
            "choices": self.flat["target_argmax"][labels],
            "logsumexp": self.flat["target_logsumexp"][labels],
            "answers": self.within[labels],
        }


def label_rows(batch: Batch, t2d: Tensor, mask_on: str, step_weights: Sequence[float]) -> Batch:
    """Find the labels of a packed or padded batch [B, S]: supervised, in the draft vocabulary.

    The result has no padding.  By token: input_ids, hidden_states, document_ids, position_ids, and
        supervised  [1, N] bool: the row's label of step 0 is supervised, drafted or not
        starts      [1, N] bool: of these, the ones a draft starts from within an answer
    by label, ascending:
        final         [U, H], the target's final state
        choices       [U] int64, its own next token
        logsumexp     [U] float32, of its logits over its whole vocabulary
        answers       [U] bool: the label's token is supervised, whatever the mask is on
        students      [U, R] int64, the row that predicts the label at each step
        present       [U, R] bool: that row is in the label's document; else `students` is 0
        row_weights   [U, R] float32: the step's weight where a row is present
    and what `document_bounds` says of the documents.  States may be on another device than all
    else, which is on the CPU.
    """
    tokens = Tokens(batch, FIELDS, mask_on)
    positions, choices = tokens.flat[POSITION_IDS], tokens.flat["target_argmax"]
    labels = (tokens.asked & t2d[choices]).nonzero().squeeze(1)
    back = 1 + torch.arange(len(step_weights))
    present = positions[labels, None] >= back
    supervised = torch.zeros_like(tokens.asked)
    supervised[:-1] = tokens.asked[1:]
    return {
        **tokens.by_token(supervised=supervised, starts=tokens.starts),
        **tokens.by_label(labels),
        "students": (labels[:, None] - back).masked_fill_(~present, 0),
        "present": present,
        "row_weights": present * torch.tensor(step_weights, dtype=torch.float32),
        **document_bounds(tokens.documents),
    }


def prefix_hits(hits: Tensor, students: Tensor, present: Tensor, count: int) -> Tensor:
    """Return how many steps from the first on each of `count` rows predicted right, [N] int64.

    `hits` [U, R] are of the labels; what is no label (not supervised, not in the draft
    vocabulary) is a miss.
    """
    by_row = torch.zeros(hits.shape[1], count + 1, dtype=torch.int64, device=hits.device)
    column = students.masked_fill(~present, count)
    step = torch.arange(hits.shape[1], device=hits.device).expand_as(column)
    by_row[step, column] = (hits & present).long()
    return by_row[:, :count].cumprod(dim=0).sum(dim=0)
