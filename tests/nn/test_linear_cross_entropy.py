"""The fused head and loss against the plain form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
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


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(dim=1)


def sizes(hidden: Tensor, weight: Tensor) -> Tensor:
    """The largest sum of absolute values behind a logit: a loss is a difference of logits."""
    return (hidden.detach().double().abs() @ weight.double().abs().t()).max()


def case(
    rows: int, vocab: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(rows * vocab)
    hidden = torch.randn(rows, 32, generator=gen).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, 32, generator=gen).to(device, dtype)
    labels = torch.randint(vocab, (rows,), generator=gen).to(device)
    scale = torch.rand(rows, generator=gen).to(device)
    return hidden, weight, labels, scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("rows", "vocab", "chunk"), [(37, 97, 8), (16, 5003, 16), (5, 4096, 100), (3, 2, 1)]
)
def test_losses_best_tokens_and_gradients(
    device: str, softcap: float | None, rows: int, vocab: int, chunk: int
) -> None:
    hidden, weight, labels, scale = case(rows, vocab, device)
    losses, best = linear_cross_entropy(hidden, weight, labels, softcap=softcap, chunk=chunk)
    (losses * scale).sum().backward()
    assert hidden.grad is not None

    exact = hidden.detach().double().requires_grad_()
    want, want_best = plain(exact, weight, labels, softcap)
    (want * scale).sum().backward()
    assert exact.grad is not None

    assert losses.dtype == torch.float32
    terms = hidden.shape[1] + vocab
    close(losses, want, terms=terms, scale=sizes(hidden, weight))
    close(hidden.grad, exact.grad, terms=terms)
    assert torch.equal(best, want_best)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_head_keeps_a_float32_softmax(device: str) -> None:
    hidden, weight, labels, _ = case(64, 3001, device, torch.bfloat16)
    losses, _ = linear_cross_entropy(hidden, weight, labels, chunk=24)
    losses.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    want, _ = plain(exact, weight, labels, None)
    want.sum().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    # the logits are rounded to bfloat16 once, and a loss is a difference of two
    largest = (exact @ weight.double().t()).detach().abs().max()
    close(losses, want, terms=1, factor=1, dtype=torch.bfloat16, scale=largest)
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02  # a logit of 16 is off by up to 2^-5, so a probability by 3 %; mostly less


def test_gradient_matches_finite_differences() -> None:
    hidden, weight, labels, scale = case(4, 50, "cpu")

    def loss(values: Tensor) -> float:
        losses, _ = linear_cross_entropy(values, weight, labels, softcap=10.0, chunk=3)
        return float((losses * scale).sum())

    losses, _ = linear_cross_entropy(hidden, weight, labels, softcap=10.0, chunk=3)
    (losses * scale).sum().backward()
    assert hidden.grad is not None
    for row, col in [(0, 0), (1, 7), (3, 31)]:
        step = torch.zeros_like(hidden)
        step[row, col] = 1e-2
        base = hidden.detach()
        slope = (loss(base + step) - loss(base - step)) / 2e-2
        # losses of about 30 are off by 2^-19, over a distance of 2e-2; the rest is curvature
        assert slope == pytest.approx(float(hidden.grad[row, col]), abs=2e-3)


def test_no_rows_gives_no_loss_and_a_zero_gradient() -> None:
    hidden, weight, labels, _ = case(4, 10, "cpu")
    losses, best = linear_cross_entropy(hidden[:0], weight, labels[:0])
    losses.sum().backward()
    assert losses.shape == best.shape == (0,)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_no_gradient_is_made_when_none_is_wanted() -> None:
    hidden, weight, labels, _ = case(4, 10, "cpu")
    with torch.no_grad():
        losses, _ = linear_cross_entropy(hidden, weight, labels)
    assert not losses.requires_grad
    want = plain(hidden, weight, labels, None)[0]
    close(losses, want, terms=32 + 10, scale=sizes(hidden, weight))


def test_the_inputs_are_left_as_they_were() -> None:
    hidden, weight, labels, _ = case(6, 11, "cpu")
    before = hidden.detach().clone(), weight.clone()
    linear_cross_entropy(hidden, weight, labels, chunk=4)
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


def test_a_trained_head_is_refused() -> None:
    hidden, weight, labels, _ = case(4, 10, "cpu")
    with pytest.raises(ValueError, match="takes a frozen head"):
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)
