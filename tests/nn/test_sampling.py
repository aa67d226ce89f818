from __future__ import annotations

import pytest
import torch

from specforge_core.nn.sampling import sample
from specforge_core.types import Sampling


def sampling(temperature: float) -> Sampling:
    return Sampling(temperature=temperature, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_at_temperature_0_the_best_is_chosen(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    places, probs = sample(logits, sampling(0.0))
    assert torch.equal(places, logits.argmax(-1))
    assert probs is None


def test_places_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    exact = (logits / 2).exp()
    exact /= exact.sum(-1, keepdim=True)
    places, probs = sample(logits.expand(4000, 2, 3).flatten(0, 1), sampling(2.0))
    assert probs is not None
    torch.testing.assert_close(probs[:2], exact)
    counts = torch.nn.functional.one_hot(places.view(4000, 2), 3).float().sum(0)
    chi_square = ((counts - 4000 * exact) ** 2 / (4000 * exact)).sum(-1)
    assert chi_square.max() < 18  # 2 degrees of freedom: one in 8,000


def test_one_draw_is_a_scalar() -> None:
    place, probs = sample(torch.tensor([0.0, 30.0]), sampling(1.0))
    assert place.shape == ()
    assert int(place) == 1
    assert probs is not None
    assert probs.shape == (2,)
