"""Products in float8, against the same rule in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from specforge_core.compiled import CACHE, compile_units, recompute_units
from specforge_core.errors import ConfigError
from specforge_core.float8 import (
    Float8Linear,
    in_words,
    multiply,
    products,
    quantise,
    quantise_weight,
    to_float8,
)
from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy
from specforge_core.types import Draft

CPU = torch.device("cpu")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
ROUNDED = 1e-2  # relative: of results in bfloat16, and of numbers that lie between two of float8


def exact(x: Tensor) -> Tensor:
    """Return a matrix as float8 keeps it, a scale for each line, in float64.

    e4m3 has 3 bits behind the first one, down to 2^-6, and steps of 2^-9 below.
    """
    scales = x.double().abs().amax(1, keepdim=True) / 448
    wide = x.double() / scales
    steps = 2.0 ** (wide.abs().clamp(min=2**-6).log2().floor() - 3)
    return (wide / steps).round() * steps * scales


def draws(*shape: int, seed: int, device: str = "cpu") -> Tensor:
    """Draw numbers whose lines and columns differ in size, with some far out."""
    gen = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[-1], generator=gen).exp()
    return (torch.randn(shape, generator=gen) ** 3 * spread).to(device, torch.bfloat16)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 37, 48])
def test_a_product_and_its_gradients_are_those_of_what_float8_keeps(device: str, rows: int) -> None:
    x = draws(2, rows, 64, seed=0, device=device).requires_grad_()
    weight = draws(96, 64, seed=1, device=device).requires_grad_()
    grad = draws(2, rows, 96, seed=2, device=device)
    (out,) = products(x, weight)
    d_x, d_weight = torch.autograd.grad(out, (x, weight), grad)
    out = out.detach()
    a, w, g = x.detach().flatten(0, 1), weight.detach(), grad.flatten(0, 1)
    wanted = {
        "out": (out.flatten(0, 1), exact(a) @ exact(w).t(), a.double() @ w.double().t()),
        "d_x": (d_x.flatten(0, 1), exact(g) @ exact(w.t()).t(), g.double() @ w.double()),
        "d_weight": (d_weight, exact(g.t()) @ exact(a.t()).t(), g.double().t() @ a.double()),
    }
    for name, (found, by_rule, plain) in wanted.items():
        assert found.dtype == torch.bfloat16
        assert relative(found, by_rule) < ROUNDED, name
        assert relative(found, plain) < 0.05, name
        # it is float8 that multiplies, and nothing wider
        assert relative(found, plain) > 2 * relative(found, by_rule), name


def test_products_with_one_input_and_weights_made_before_are_the_same() -> None:
    x = draws(16, 64, seed=0).requires_grad_()
    up, down = (draws(n, 64, seed=n).requires_grad_() for n in (96, 32))
    ready = quantise_weight(down)
    together = products(x, up, ready)
    apart = products(x, up)[0], products(x, down)[0]
    for found, wanted in zip(together, apart, strict=True):
        assert torch.equal(found, wanted)
    sums = [sum(out.float().square().sum() for out in outs) for outs in (together, apart)]
    for found, wanted in zip(*(torch.autograd.grad(s, (x, up)) for s in sums), strict=True):
        torch.testing.assert_close(found, wanted, rtol=ROUNDED, atol=ROUNDED)
    assert not any(tensor.requires_grad for lines in ready for tensor in lines)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(16,), (37,), (160, 0, 53), (0,)])
def test_matrices_below_each_other_are_one(device: str, counts: tuple[int, ...]) -> None:
    x = draws(sum(counts), 144, seed=0, device=device)
    rows, columns = quantise(*x.split(counts))
    for lines, wanted in ((rows, x), (columns, x.t())):
        found = lines.values.float() * lines.scales
        assert not found[:, wanted.shape[1] :].any()
        if wanted.numel():
            assert relative(found[:, : wanted.shape[1]], exact(wanted)) < 1e-3
    assert columns.values.shape[1] % 16 == 0
    assert quantise(x, columns=False)[1].values.numel() == 0
    assert multiply(columns, columns).shape == (144, 144)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_any_size_are_kept(device: str, size: float) -> None:
    x = draws(4, 64, seed=0, device=device).float() * size
    values, scales = quantise(x)[0]
    assert relative(values.double() * scales.double(), x) < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_lines_of_zeros_stay_and_what_is_not_finite_shows(device: str) -> None:
    x = torch.ones(4, 32, device=device)
    x[0], x[1, 3], x[2, 5] = 0, torch.inf, torch.nan
    weight = torch.ones(16, 32, device=device, requires_grad=True)
    (out,) = products(x, weight)
    assert bool((out[0] == 0).all())
    assert not bool(out[1:3].isfinite().any())
    assert bool((out[3] == 32).all())
    assert products(x[:0], weight)[0].shape == (0, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 100.0])
def test_a_frozen_head_gives_what_float8_keeps_of_it(device: str, softcap: float | None) -> None:
    hidden = draws(37, 64, seed=0, device=device).div(8).requires_grad_()
    weight = draws(480, 64, seed=1, device=device)
    labels = torch.arange(0, 370, 10, device=device)
    losses, _ = linear_cross_entropy(
        *(hidden, weight, labels), softcap=softcap, chunk=16, float8=quantise_weight(weight)
    )
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    logits = (exact(hidden.detach()) @ exact(weight).t()).bfloat16().double().requires_grad_()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    (d_logits,) = torch.autograd.grad(wanted.sum(), logits)
    at = torch.arange(37, device=device), labels
    own, rest = d_logits[at], d_logits.index_put(at, d_logits.new_zeros(()))
    by_rule = exact(rest) @ exact(weight.t()).t() + own[:, None] * weight.double()[labels]
    assert relative(losses.detach(), wanted.detach()) < ROUNDED
    assert relative(grad, by_rule) < 2 * ROUNDED  # the logits' gradient is rounded to bfloat16
    assert relative(grad, d_logits @ weight.double()) > 2 * relative(grad, by_rule)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trained_head_is_near_the_one_that_is_not_in_float8(device: str) -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = (12, 3, 64), (480, 64), (12, 64), (480, 64)
    drawn = (torch.randn(shape, generator=gen).div(2).to(device).bfloat16() for shape in shapes)
    hidden, weight, *teacher = drawn
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = []
    for ready in (quantise_weight(weight), None):
        total, _ = linear_soft_cross_entropy(
            *leaves, *teacher, torch.ones(12, 3, device=device), chunk=16, float8=ready
        )
        found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for narrow, wide in zip(*found, strict=True):
        assert 1e-5 < relative(narrow, wide) < 0.1


class Unit(nn.Module):
    def __init__(self, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)
        self.gains = nn.Parameter(torch.ones(2, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.silu(self.up(x))) * self.gains[0]
        return out


class Model(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self.head = nn.Linear(32, 100)  # no hidden unit: no size is too odd for it


def test_linear_layers_of_hidden_units_are_changed_and_nothing_that_is_saved() -> None:
    model = Model(Unit())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_float8(Draft(model=model, shard=(model.unit,)), CPU)
    changed = [name for name, m in model.named_modules() if isinstance(m, Float8Linear)]
    assert changed == ["unit.up", "unit.down"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_heads_are_told_of() -> None:
    model, frozen = Model(Unit()), nn.ModuleList([nn.Linear(32, 96), nn.Linear(32, 100)])

    class Step:
        def float8_heads(self, draft: Draft) -> dict[str, Tensor]:
            return {"one": frozen[0].weight, "other": frozen[1].weight}

    draft = Draft(model=model, frozen=frozen, shard=(model.unit,))
    to_float8(draft, CPU)
    in_float8, others = in_words(draft, Step()).split("; ")
    assert in_float8 == "in float8: 2 linear layers and one"
    assert others == "not: unit.gains, head.weight, other (no multiples of 16)"
    assert in_words(draft, None).endswith("; not: unit.gains, head.weight, what is frozen")


@pytest.mark.parametrize(
    ("unit", "hidden", "reason"),
    [
        (Unit(32, 40), True, r"multiples of 16, and unit\.up is 32 x 40\."),
        (Unit(), False, r"Draft\.hidden, else compile, else shard\), and there are none\."),
    ],
)
def test_a_draft_that_cannot_is_refused(unit: nn.Module, hidden: bool, reason: str) -> None:
    model = Model(unit)
    with pytest.raises(ConfigError, match=rf"{reason} Try: train\.precision=null"):
        to_float8(Draft(model=model, hidden=(unit,) if hidden else None), CPU)
    assert not any(isinstance(module, Float8Linear) for module in model.modules())


def test_a_device_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9 or more, and A100 has 8\.0\. Try: train\.prec"):
        to_float8(Draft(model=Unit()), torch.device("cuda"))


def test_without_gradients_a_layer_computes_as_it_will_be_served() -> None:
    unit, x = Unit(), torch.randn(5, 32)
    plain = unit(x)
    to_float8(Draft(model=unit, shard=(unit,)), CPU)
    assert not torch.equal(unit(x), plain)
    with torch.no_grad():
        assert torch.equal(unit(x), plain)


def ragged(unit: nn.Module, device: str, count: int) -> None:
    for number in range(count):
        rows = 2 + (number * 37) % 701
        x = torch.randn(1, rows, 32, device=device, requires_grad=True)
        torch.autograd.backward(unit(x).square().sum())
        assert x.grad is not None


def test_rows_of_any_number_share_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    torch.compiler.reset()
    counter = CompileCounter()
    unit = Unit()
    to_float8(Draft(model=unit, shard=(unit,)), CPU)
    compile_units([unit], counter)
    ragged(unit, "cpu", 6)
    assert counter.frame_count == 1


def test_a_recomputed_unit_gives_the_same_gradients() -> None:
    unit = Unit()
    to_float8(Draft(model=unit, shard=(unit,)), CPU)
    x = torch.randn(1, 20, 32)
    plain = torch.autograd.grad(unit(x).square().sum(), list(unit.parameters()))
    recompute_units([unit])
    again = torch.autograd.grad(unit(x).square().sum(), list(unit.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_a_compiled_unit_is_compiled_once_on_a_gpu_and_gives_what_a_plain_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    device = torch.device("cuda")
    units = [Unit().to(device, torch.bfloat16) for _ in range(2)]
    units[1].load_state_dict(units[0].state_dict())
    for unit in units:
        to_float8(Draft(model=unit, shard=(unit,)), device)
    torch.compiler.reset()
    counters.clear()
    compile_units([units[1]])
    x = torch.randn(1, 333, 32, device=device, dtype=torch.bfloat16)
    found = [torch.autograd.grad(u(x).square().sum(), list(u.parameters())) for u in units]
    for plain, compiled in zip(*found, strict=True):
        assert relative(compiled, plain) < 0.03  # fused, less is rounded before float8 is
    units[1].float()
    torch.compiler.reset()
    counters.clear()
    ragged(units[1], "cuda", 100)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
