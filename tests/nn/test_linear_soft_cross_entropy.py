"""The chunked loss against its formula in float64, on the CPU and where there is one a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.nn.soft_loss import Objective, SoftLoss, SoftRows
from specforge_core.testing.close import close

CAPS = [(None, None), (2.0, None), (2.0, 1.5)]  # the teacher's, the student's
LOSSES = [
    SoftLoss(),
    SoftLoss("log_overlap"),
    SoftLoss("hybrid"),
    SoftLoss("hybrid", scale=0.7, decay=1.5),
]


def data(
    labels: int = 7, students: int = 3, hidden: int = 16, vocab: int = 53, seed: int = 0
) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return {
        "hidden": draw(labels, students, hidden),
        "weight": draw(vocab, hidden) * 0.4,
        "teacher_hidden": draw(labels, hidden),
        "teacher_weight": draw(vocab, hidden) * 0.4,
        "row_weights": torch.rand(labels, students, generator=gen, dtype=torch.float64),
    }


def teacher_scores(given: dict[str, Tensor], softcap: float | None) -> Tensor:
    scores = given["teacher_hidden"] @ given["teacher_weight"].t()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def pruned(given: dict[str, Tensor], known: int, softcap: float | None = None) -> dict[str, Tensor]:
    """Let the student know the first `known` tokens only."""
    whole = teacher_scores(given, softcap).logsumexp(-1)
    parts = {name: given[name][:known] for name in ("weight", "teacher_weight")}
    return given | parts | {"teacher_logsumexp": whole}


def formula(
    given: dict[str, Tensor],
    loss: SoftLoss,
    softcap: float | None = None,
    own: float | None = None,
) -> tuple[Tensor, SoftRows]:
    """The losses as written, one row at a time."""
    scores = teacher_scores(given, softcap)
    losses, overlaps, best = [], [], []
    for label, rows in enumerate(given["hidden"]):
        p = drawn = scores[label].softmax(-1)
        if "teacher_logsumexp" in given:
            drawn = (scores[label] - given["teacher_logsumexp"][label]).exp()
        for row in rows:
            logits = row @ given["weight"].t()
            logits = logits if own is None else own * torch.tanh(logits / own)
            q = logits.softmax(-1)
            cross, kl = -(p * q.log()).sum(), (p * (p / q).log()).sum()
            a = torch.minimum(drawn, q).sum()
            mix = loss.scale * torch.exp(-loss.decay * a.detach())
            losses.append(
                {
                    "cross_entropy": cross,
                    "log_overlap": -a.log(),
                    "hybrid": mix * kl + (1 - mix) * (1 - a),
                }[loss.objective]
            )
            overlaps.append(a)
            best.append(logits.argmax())
    shape = given["row_weights"].shape
    each = torch.stack(losses).view(shape)
    rows = SoftRows(each, torch.stack(overlaps).view(shape), torch.stack(best).view(shape))
    return (each * given["row_weights"]).sum(), rows


def leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given | {n: given[n].detach().clone().requires_grad_() for n in ("hidden", "weight")}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.objective}-{loss.scale}")
@pytest.mark.parametrize("chunk", [1, 6, 10_000])
@pytest.mark.parametrize(("softcap", "own"), CAPS)
@pytest.mark.parametrize("known", [None, 20])
def test_values_and_gradients_are_the_formulas(
    loss: SoftLoss, chunk: int, softcap: float | None, own: float | None, known: int | None
) -> None:
    given = data() if known is None else pruned(data(), known, softcap)
    ours, theirs = leaves(given), leaves(given)
    total, rows = linear_soft_cross_entropy(
        **ours, loss=loss, softcap=own, teacher_softcap=softcap, chunk=chunk
    )
    want, want_rows = formula(theirs, loss, softcap, own)
    terms = 16 + 53  # the hidden size and the vocabulary
    # the weighted sum is one more; the overlap's loss is the logarithm of a sum below 1
    close(total, want, terms=terms + rows.losses.numel())
    close(rows.losses, want_rows.losses, terms=terms)
    close(rows.overlaps, want_rows.overlaps, terms=terms)
    assert torch.equal(rows.best, want_rows.best)
    (3 * total).backward()
    (3 * want).backward()
    for name in ("hidden", "weight"):
        close(ours[name].grad, theirs[name].grad, terms=terms + rows.losses.numel())


def test_what_the_teacher_gives_to_unknown_tokens_is_accepted_nowhere() -> None:
    given = pruned(data(), 20)
    whole = teacher_scores(data(), None).softmax(-1)
    mass = whole[:, :20].sum(-1)
    assert float(mass.max()) < 0.8  # what the two teachers differ by
    alone = given | {"teacher_logsumexp": None}  # the known tokens as if there were no others
    for objective in ("log_overlap", "hybrid"):
        told, lost = (
            linear_soft_cross_entropy(**g, loss=SoftLoss(objective))[1] for g in (given, alone)
        )
        assert bool((told.overlaps <= mass[:, None]).all())
        assert bool((told.overlaps < lost.overlaps).all())
        assert bool((told.losses > lost.losses).all())
    # how the known tokens compare among themselves does not change
    told, lost = (linear_soft_cross_entropy(**g)[1] for g in (given, alone))
    assert torch.equal(told.losses, lost.losses)
    assert not torch.equal(told.overlaps, lost.overlaps)


@pytest.mark.parametrize("objective", ["cross_entropy", "log_overlap", "hybrid"])
def test_rounding_makes_no_part_more_than_the_whole(objective: Objective) -> None:
    """A log-sum-exp below what its own tokens sum to counts as that sum."""
    given = data()
    whole = teacher_scores(given, None).logsumexp(-1)
    given["weight"] = given["teacher_weight"]
    given["hidden"] = given["teacher_hidden"][:, None].expand_as(given["hidden"]).clone()
    for low in (whole, whole - 1e-3, whole - 5):
        found = linear_soft_cross_entropy(**given, loss=SoftLoss(objective), teacher_logsumexp=low)[
            1
        ]
        close(found.overlaps, torch.ones_like(found.overlaps), terms=53)
        if objective != "cross_entropy":
            close(found.losses, torch.zeros_like(found.losses), terms=53, scale=1.0)


def test_the_gradient_is_also_that_of_finite_differences() -> None:
    given = leaves(data(2, 2, 3, 5))

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_soft_cross_entropy(**(given | {"hidden": hidden, "weight": weight}))[0]

    assert torch.autograd.gradcheck(run, (given["hidden"], given["weight"]))


@pytest.mark.parametrize("objective", ["cross_entropy", "log_overlap", "hybrid"])
def test_a_row_of_weight_zero_changes_nothing(objective: Objective) -> None:
    given = data()
    given["row_weights"][2, 1] = 0
    ours = leaves(given)
    linear_soft_cross_entropy(**ours, loss=SoftLoss(objective))[0].backward()
    assert ours["hidden"].grad is not None
    assert not ours["hidden"].grad[2, 1].any()
    moved = leaves(given)
    moved["hidden"].data[2, 1] += 5
    linear_soft_cross_entropy(**moved, loss=SoftLoss(objective))[0].backward()
    close(moved["weight"].grad, ours["weight"].grad, terms=16 + 53 + 21)


def test_where_teacher_and_student_share_nothing_the_overlap_loss_is_skipped() -> None:
    given = leaves(data(1, 1, 2, 2))
    given["weight"] = torch.tensor([[900.0, 0.0], [0.0, 0.0]]).double().requires_grad_()
    given["teacher_weight"] = torch.tensor([[0.0, 0.0], [900.0, 0.0]]).double()
    for name in ("hidden", "teacher_hidden"):
        given[name] = torch.ones_like(given[name]).requires_grad_(name == "hidden")
    total, rows = linear_soft_cross_entropy(**given, loss=SoftLoss("log_overlap"))
    total.backward()
    assert float(rows.overlaps) == 0
    assert float(total.detach()) == 0
    assert given["hidden"].grad is not None
    assert not given["hidden"].grad.any()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    both, one = leaves(data()), leaves(data())
    one["weight"].requires_grad_(False)
    for given in (both, one):
        linear_soft_cross_entropy(**given)[0].backward()
    assert one["weight"].grad is None
    assert torch.equal(one["hidden"].grad, both["hidden"].grad)  # type: ignore[arg-type]


def test_no_rows_give_a_loss_of_zero() -> None:
    given = leaves(data())
    for name in ("hidden", "teacher_hidden", "row_weights"):
        given[name] = given[name].detach()[:0]
    given["hidden"].requires_grad_()
    total, rows = linear_soft_cross_entropy(**given)
    total.backward()
    assert float(total.detach()) == 0
    assert rows.best.shape == (0, 3)
    assert given["weight"].grad is not None
    assert not given["weight"].grad.any()


def test_bfloat16_heads_are_near_the_formula() -> None:
    given = data(64, 4, 64, 301)
    ours, theirs = leaves(given), leaves(given)
    narrow = {n: t.bfloat16() for n, t in ours.items() if n != "row_weights"}
    total, _ = linear_soft_cross_entropy(**narrow, row_weights=ours["row_weights"], chunk=32)
    want, _ = formula(theirs, SoftLoss())
    total.backward()
    want.backward()
    assert total.dtype == torch.float64 or total.dtype == torch.float32
    # inputs and logits are rounded to bfloat16 once each; errors of 256 rows average out
    close(total, want, terms=1, factor=1, dtype=torch.bfloat16)
    for name in ("hidden", "weight"):
        error = (ours[name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert float(error) < 2e-2  # of its norm: bfloat16 rounds inputs and logits to 2^-8 each


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.objective}-{loss.scale}")
@pytest.mark.parametrize(("softcap", "own"), CAPS)
@pytest.mark.parametrize("known", [None, 5003])
def test_the_gpu_kernel_is_the_formula(
    loss: SoftLoss, softcap: float | None, own: float | None, known: int | None
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    given = data(50, 7, 64, 9001)
    if known is not None:
        given = pruned(given, known, softcap)
    ours = {n: t.cuda().float() for n, t in leaves(given).items()}
    for name in ("hidden", "weight"):
        ours[name] = ours[name].detach().requires_grad_()
    theirs = leaves({n: t.cuda() for n, t in given.items()})
    total, rows = linear_soft_cross_entropy(
        **ours, loss=loss, softcap=own, teacher_softcap=softcap, chunk=100
    )
    want, want_rows = formula(theirs, loss, softcap, own)
    total.backward()
    want.backward()
    terms = 64 + 9001  # the hidden size and the vocabulary
    close(rows.losses, want_rows.losses, terms=terms)
    close(rows.overlaps, want_rows.overlaps, terms=terms)
    logits = theirs["hidden"].detach() @ theirs["weight"].detach().t()
    best = logits if own is None else own * torch.tanh(logits / own)
    found = best.gather(-1, rows.best[..., None])[..., 0]
    # many are as good as one where a cap flattens them; chosen by logits in float32
    close(found, best.amax(-1), terms=terms, dtype=torch.float32)
    for name in ("hidden", "weight"):
        error = (ours[name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert float(error) < 1e-3  # TF32 is off: float32 products
