"""Linear layers in float8, as they are, compiled and recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from specforge_core.compiled import CACHE, compile_units, compiled, recompute_units
from specforge_core.errors import ConfigError
from specforge_core.float8 import Float8Linear, by_rows, in_words, to_float8
from specforge_core.types import Draft

CPU = torch.device("cpu")


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


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
    """And what is in many layers, once."""
    model, frozen = (
        Model(nn.Sequential(Unit(), Unit())),
        nn.ModuleList([nn.Linear(32, 96), nn.Linear(32, 100)]),
    )

    class Step:
        def float8_heads(self, draft: Draft) -> dict[str, Tensor]:
            return {"one": frozen[0].weight, "other": frozen[1].weight}

    draft = Draft(model=model, frozen=frozen, shard=(model.unit,))
    to_float8(draft, CPU)
    in_float8, others = in_words(draft, Step()).split("; ")
    assert in_float8 == "in float8: 4 linear layers and one"
    assert others == "not: unit.*.gains, head.weight, other (no multiples of 16)"
    assert in_words(draft, None).endswith("; not: unit.*.gains, head.weight, what is frozen")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_traced_unit_gives_the_gradients_of_a_plain_one(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    units = [Unit().to(dtype) for _ in range(2)]
    units[1].load_state_dict(units[0].state_dict())
    for unit in units:
        to_float8(Draft(model=unit, shard=(unit,)), CPU)
    torch.compiler.reset()
    compile_units([units[1]], "aot_eager")
    x = torch.randn(1, 37, 32, dtype=dtype, requires_grad=True)
    found = [torch.autograd.grad(unit(x).square().sum(), [x, *unit.parameters()]) for unit in units]
    for plain, traced in zip(*found, strict=True):
        assert relative(traced, plain) < 1e-2


def test_traced_lines_are_laid_out_as_the_kernel_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    torch.compiler.reset()
    traced = compiled(lambda x: by_rows(x).values, "aot_eager")
    x = torch.randn(64, 48).t()
    found = traced(x)
    assert found.is_contiguous()
    assert torch.equal(found.float(), by_rows(x).values.float())


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
    for plain, fused in zip(*found, strict=True):
        assert relative(fused, plain) < 0.03  # fused, less is rounded before float8 is
    units[1].float()
    torch.compiler.reset()
    counters.clear()
    ragged(units[1], "cuda", 100)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
