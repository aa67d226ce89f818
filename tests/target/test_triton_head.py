"""The kernel that reads a chunk of logits once, against what torch says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_core.target.head import Head
from specforge_core.testing.close import close

pytestmark = pytest.mark.gpu


def summarize(logits: Tensor) -> tuple[Tensor, Tensor]:
    from specforge_core.target.triton_head import summarize_logits

    return summarize_logits(logits)


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 97, 8192, 50_257, 151_936])
def test_the_first_of_the_best_and_the_sum_of_all(vocab: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, vocab, generator=draw)).to(dtype).cuda()
    logits[1] = 2.0  # all alike
    tokens, sums = summarize(logits)
    assert torch.equal(tokens, logits.double().argmax(-1))
    close(sums, logits.double().logsumexp(-1), terms=vocab)


def test_logits_are_scaled_and_capped_as_on_a_cpu():
    torch.manual_seed(0)
    parts = {"weight": torch.randn(3000, 8), "bias": torch.randn(3000)}
    states = torch.randn(700, 8)
    expected = Head(**parts, scale=0.5, softcap=3.0).logits(states)
    on_gpu = Head(**{name: x.cuda() for name, x in parts.items()}, scale=0.5, softcap=3.0)
    tokens, sums = (x.cpu() for x in on_gpu.summarize(states.cuda()))
    chosen = expected.gather(1, tokens[:, None])[:, 0]
    close(chosen, expected.amax(-1), terms=8)  # caps make some as near as rounding
    close(sums, expected.double().logsumexp(-1), terms=3000)


def test_what_is_not_finite_is_not_hidden():
    logits = torch.randn(5, 20_000, device="cuda", dtype=torch.bfloat16)
    logits[0, 17_000:17_003] = torch.nan
    logits[1, [5, 700]] = torch.inf
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, :19_999] = -torch.inf
    tokens, sums = summarize(logits)
    assert tokens.tolist() == [17_000, 5, 0, 0, 19_999]
    assert sums[:4].isfinite().sum() == 0
    assert sums[4] == logits[4, 19_999].float()
