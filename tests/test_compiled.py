"""Units are compiled for all lengths at once, into a cache that stays."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from specforge_core.compiled import CACHE, compile_units, recompute_units, swapped
from specforge_core.train.dist import world
from specforge_core.train.fsdp import shard
from specforge_core.types import Draft


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x).square()
        return out


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """A compiler that counts graphs, with nothing compiled before."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    torch.compiler.reset()
    return CompileCounter()


def test_lengths_share_a_graph_from_the_first(counter: CompileCounter) -> None:
    unit = Unit()
    compile_units([unit], counter)
    for length in (3, 4, 700, 5000):
        unit(torch.ones(1, length, 8)).sum().backward()
    assert counter.frame_count == 1


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.size = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x)
        return heads.view(*heads.shape[:-1], -1, self.size).softmax(-1)


def test_a_sharded_modules_own_numbers_are_constants(counter: CompileCounter) -> None:
    """As those of one that is not sharded are: as symbols they are traced, and computed with."""

    def see(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        inputs.append([n.name for n in graph.graph.nodes if n.op == "placeholder"])
        return graph

    inputs: list[list[str]] = []
    unit = Heads()
    compile_units([unit], see)
    draft = Draft(model=nn.Sequential(unit), shard=(unit,))
    with world(torch.device("cpu")) as alone:
        shard(draft, alone.mesh, torch.float32)
        for length in (5, 700):
            draft.model(torch.ones(2, length, 8)).sum().backward()
    assert len(inputs) == 1  # for all lengths
    assert [name for name in inputs[0] if "size" in name] == []


def test_a_recomputed_unit_keeps_its_input_alone_and_is_compiled_once(
    counter: CompileCounter,
) -> None:
    kept: list[list[int]] = []
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        unit = Unit()
        if recompute:
            compile_units([unit], counter, inner=True)
            recompute_units([unit])
        x = torch.ones(1, 700, 8, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            out = unit(x)
        out.sum().backward()
        assert unit.linear.weight.grad is not None
        gradients += [unit.linear.weight.grad]
        kept.append([size for size in sizes if size == x.numel()])
    assert torch.equal(*gradients)
    assert len(kept[0]) == 2  # what the product and the square read
    assert len(kept[1]) == 1  # the unit's input
    assert counter.frame_count == 1
    with torch.no_grad():
        assert torch.equal(unit(x), out)


@pytest.mark.parametrize("given", [None, "/somewhere"])
def test_the_cache_is_where_the_user_says_or_at_home(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, given or "")  # so that it is put back afterwards
    if given is None:
        monkeypatch.delenv(CACHE)
    compile_units([])
    assert os.environ[CACHE] == (given or str(tmp_path / ".cache/specforge/compile"))
    monkeypatch.setenv(CACHE, given or "")


def test_forwards_are_swapped_back_also_those_that_were_a_modules_own() -> None:
    plain, own = Unit(), Unit()
    mine = own.forward = lambda x: x + 1  # type: ignore[method-assign]
    x = torch.ones(1, 8)
    before = plain(x)
    other = lambda x: -x  # noqa: E731
    with swapped([(plain, other), (own, other)]):
        assert torch.equal(plain(x), -x)
        assert torch.equal(own(x), -x)
    assert torch.equal(plain(x), before)
    assert "forward" not in vars(plain)
    assert own.forward is mine


@pytest.mark.slow  # inductor is imported
def test_modules_are_called_by_other_threads_while_inductor_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import loop_body

    shim = loop_body.InterpreterShim
    monkeypatch.setattr(loop_body, "identity", dawdle)
    shim._dummy_gm.cache_clear()
    compile_units([])
    ended, layer = threading.Event(), nn.Linear(2, 2)
    found: list[BaseException] = []

    def call() -> None:
        try:
            while not ended.is_set():
                layer(torch.ones(1, 2))
        except BaseException as exc:
            found.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    shim(torch.fx.Graph(), {})  # as it is of each graph
    ended.set()
    thread.join()
    assert found == []


def dawdle(x: object) -> object:
    """Be `identity` of `loop_body`, for as long as other threads need to get into it."""
    time.sleep(0.2)
    return x
