"""The best tokens of a head against the plain form in float64."""

from __future__ import annotations

import pytest
import torch

from specforge_core.nn.linear_top_k import linear_top_k
from specforge_core.testing.close import close

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(
    ("rows", "vocab", "k", "chunk"), [(37, 97, 4, 8), (5, 4096, 1, 100), (3, 6, 6, 1), (0, 9, 2, 8)]
)
def test_tokens_logits_and_gradients(
    device: str,
    dtype: torch.dtype,
    softcap: float | None,
    more: int,
    rows: int,
    vocab: int,
    k: int,
    chunk: int,
) -> None:
    draw = torch.Generator().manual_seed(rows * vocab + k)
    hidden = torch.randn(rows, 32, generator=draw).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, 32, generator=draw).to(device, dtype)
    scale = torch.rand(rows, k + more, generator=draw).to(device, dtype)
    also = torch.randint(vocab, (rows,), generator=draw).to(device) if more else None
    ids, logits = linear_top_k(hidden, weight, k, also=also, softcap=softcap, chunk=chunk)
    (logits * scale).sum().backward()

    exact = hidden.detach().double().requires_grad_()
    whole = exact @ weight.double().t()
    if softcap is not None:
        whole = softcap * torch.tanh(whole / softcap)
    tokens = whole.topk(k, dim=1).indices
    if also is not None:
        tokens = torch.cat([tokens, also[:, None]], dim=1)
    want = whole.gather(1, tokens)
    (want * scale).sum().backward()
    assert ids.tolist() == tokens.tolist()
    assert (ids.dtype, logits.dtype) == (torch.int64, dtype)
    sizes = (exact.detach().abs() @ weight.double().abs().t()).gather(1, tokens)
    close(logits, want, terms=32, scale=sizes)
    assert hidden.grad is not None
    assert exact.grad is not None
    # before the cap's slope, a small difference of 1 and its square
    parts = torch.einsum("nk,nkh->nh", scale.double(), weight.double()[tokens].abs())
    close(hidden.grad, exact.grad, terms=32 + k + more, scale=parts)


def test_no_logits_of_all_rows_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    plain = torch.Tensor.topk

    def noting(logits: torch.Tensor, k: int, dim: int) -> object:
        made.append(logits.shape)
        return plain(logits, k, dim)

    monkeypatch.setattr(torch.Tensor, "topk", noting)
    linear_top_k(torch.randn(10, 4), torch.randn(50, 4), 2, chunk=4)
    assert made == [(4, 50), (4, 50), (2, 50)]


def test_a_head_that_is_trained_and_a_k_that_is_none_are_refused() -> None:
    weight = torch.randn(7, 4)
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k is {k}, and the head has 7 tokens"):
            linear_top_k(torch.randn(2, 4), weight, k)
    with pytest.raises(ValueError, match="takes a frozen head"):
        linear_top_k(torch.randn(2, 4), weight.requires_grad_(), 2)
