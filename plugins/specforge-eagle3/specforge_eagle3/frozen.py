"""What the draft reads of the target: its embedding, and its head's rows as the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from specforge_core.types import Draft

from .vocab import target_tokens

Model = TypeVar("Model", bound=nn.Module)
# embedding [V, H], the head's loader, and d2t [Vd], which is None where weights are about to come
TargetParts: TypeAlias = tuple[Tensor, Callable[[], Tensor], Tensor | None]


class Frozen(nn.Module):
    """The target's embedding, and its head where it is asked for: never trained, never saved."""

    def __init__(self, embed_tokens: Tensor, load_head: Callable[[], Tensor]) -> None:
        super().__init__()
        self.embed_tokens = nn.Parameter(embed_tokens, requires_grad=False)
        self._load_head = load_head
        self._rows: Tensor | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """Return the target's embeddings of `ids`.

        Unscaled also where the target scales them: they are normed before anything else.
        """
        return F.embedding(ids, self.embed_tokens)

    def teacher_head(self, d2t: Tensor) -> Tensor:
        """Return the head's rows [Vd, H or wider] of a draft vocabulary, read at the first call.

        Not before: only then are a checkpoint's weights, and with them its vocabulary, there.
        """
        if self._rows is None:
            like = self.embed_tokens
            rows = self._load_head()[target_tokens(d2t).cpu()]
            self._rows = rows.to(like.device, like.dtype)
        return self._rows


def parts(draft: Draft, model: type[Model]) -> tuple[Model, Frozen]:
    """Return a draft's model, which is of the type `model`, and what it reads of the target."""
    assert isinstance(draft.model, model)
    assert isinstance(draft.frozen, Frozen)
    return draft.model, draft.frozen
