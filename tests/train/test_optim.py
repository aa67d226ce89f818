from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from specforge_core.config import TrainConfig
from specforge_core.errors import ConfigError
from specforge_core.testing.close import close
from specforge_core.train.dist import world
from specforge_core.train.fsdp import shard, shards_of
from specforge_core.train.muon import orthogonalize
from specforge_core.train.optim import (
    SCHEDULES,
    Narrow,
    build_optimizers,
    check_kept,
    local_gradients,
    lr_factor,
    remember_peaks,
    set_learning_rate,
    square_norm,
)
from specforge_core.types import Draft


def factor(step: int, total_steps: int, config: TrainConfig) -> float:
    return lr_factor(step, total_steps, config, partial(SCHEDULES[config.schedule], config=config))


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    config = TrainConfig(schedule="constant", warmup_ratio=0.1)
    factors = [factor(step, 100, config) for step in range(100)]
    close(factors[:10], [(i + 1) / 11 for i in range(10)], terms=1)
    assert factors[10:] == [1.0] * 90


def test_cosine_ends_at_the_minimum() -> None:
    config = TrainConfig(schedule="cosine", warmup_ratio=0.0, min_lr_ratio=0.1)
    assert factor(0, 101, config) == 1.0
    close(factor(50, 101, config), 0.1 + 0.9 * 0.5, terms=4)
    close(factor(25, 101, config), 0.1 + 0.45 * (1 + math.sqrt(0.5)), terms=4)
    close(factor(100, 101, config), 0.1, terms=4)


def test_wsd_stays_then_falls_linearly() -> None:
    config = TrainConfig(schedule="wsd", warmup_ratio=0.0, decay_ratio=0.2, min_lr_ratio=0.5)
    close(factor(80, 101, config), 1.0, terms=4)
    close(factor(90, 101, config), 0.75, terms=4)
    close(factor(100, 101, config), 0.5, terms=4)


def test_only_matrices_are_decayed_and_muon_takes_those_of_the_hidden_units() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "layer": nn.Linear(4, 4)})
    draft = Draft(model=model, shard=(model["layer"],))
    (adamw,) = build_optimizers(draft, TrainConfig(weight_decay=0.5))
    decay = {p.ndim: g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decay == {2: 0.5, 1: 0.0}
    _, muon = build_optimizers(draft, TrainConfig(optimizer="muon"))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model["layer"].weight)]


class Convolved(nn.Module):
    """A hidden layer with kernels of three axes, positions, and a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.ones(2, 3, 4))
        self.positions = nn.Parameter(torch.ones(5, 4))
        self.proj = nn.Linear(4, 4)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = Convolved(), nn.Linear(4, 4, bias=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_draft_keeps_matrices_from_decaying_by_their_names(optimizer: str) -> None:
    kept = ("layer.base_kernel", "layer.positions")
    model = Root()
    draft = Draft(model=model, shard=(model.layer,), decayed=lambda name: name not in kept)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(
        optimizer=optimizer, weight_decay=0.5, learning_rate=0.5, muon_learning_rate=0.5
    )
    with world(torch.device("cpu")) as alone:
        shard(draft, alone.mesh, torch.float32)  # the names outlive it
        for optim in build_optimizers(draft, config):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)  # decay alone is left
            optim.step()
        after = {n: DTensor.full_tensor(p) for n, p in model.named_parameters()}  # type: ignore[arg-type]
    shrunk = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert shrunk == {"layer.proj.weight", "fc.weight"}
    for name in shrunk:
        close(after[name], before[name] * 0.75, terms=2)


def test_muon_takes_the_matrices_of_compiled_units_or_of_those_named_hidden() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "layer": nn.Linear(4, 4)})
    draft = Draft(model=model, compile=(model["layer"],))
    _, muon = build_optimizers(draft, TrainConfig(optimizer="muon"))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model["layer"].weight)]

    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "layer": nn.Linear(4, 4)})
    named = Draft(model=model, shard=(model["layer"],), hidden=(model["fc"],))
    _, muon = build_optimizers(named, TrainConfig(optimizer="muon"))
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model["fc"].weight)]


def test_muon_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no hidden layer with a matrix for it"):
        build_optimizers(Draft(model=nn.Linear(4, 4)), TrainConfig(optimizer="muon"))


def test_learning_rates_are_their_peak_times_a_factor() -> None:
    model = nn.Linear(3, 1)
    (adamw,) = build_optimizers(Draft(model=model), TrainConfig(learning_rate=0.5))
    adamw.param_groups[0]["lr"] = 0.25  # as a plugin's groups may have peaks of their own
    remember_peaks([adamw])
    for _ in range(2):  # from the peak each time, not from the last value
        set_learning_rate([adamw], 0.1)
    assert [g["lr"] for g in adamw.param_groups] == [0.025, 0.05]


def test_the_norm_of_all_gradients() -> None:
    model = nn.Linear(3, 1)
    model(torch.tensor([[1.0, 2.0, 2.0]])).sum().backward()
    gradients = local_gradients(model)
    assert square_norm(gradients, "mine 1.0").item() == 1 + 4 + 4 + 1
    gradients[0].mul_(2)  # they share memory with the parameters' own
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2.0, 4.0, 4.0]]


def test_muon_in_float32_does_what_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(quick: bool) -> list[torch.Tensor]:
        dtype = torch.bfloat16 if quick else torch.float32
        monkeypatch.setattr("specforge_core.train.optim.pick_dtype", lambda *_: dtype)
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False))
        draft = Draft(model=nn.Sequential(layer, nn.LayerNorm(24)), shard=(layer,))
        _, muon = build_optimizers(draft, TrainConfig(optimizer="muon", weight_decay=0.1))
        assert (type(muon) is torch.optim.Muon) is quick
        for _ in range(3):
            layer(torch.randn(64, 24)).square().sum().backward()
            muon.step()
            muon.zero_grad()
        return [p.detach() for p in layer.parameters()]

    torch.manual_seed(0)
    before = [nn.Linear(24, 40, bias=False).weight, nn.Linear(40, 24, bias=False).weight]
    for start, ours, theirs in zip(before, trained(False), trained(True), strict=True):
        moved = (theirs - start).norm()
        assert moved > 0.01
        assert (ours - theirs).norm() < 0.05 * moved


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    found = orthogonalize(torch.randn(shape), (3.4445, -4.775, 2.0315), 5)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.parametrize("shape", [(192, 576), (20, 31), (64, 24)])
def test_orthogonalize_on_the_gram_matrix_is_the_plain_iteration(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -4, shape[1]))
    a, b, c = 3.4445, -4.775, 2.0315
    x = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x if shape[0] <= shape[1] else x.T
    found = orthogonalize(matrix, (a, b, c), 5)
    # a Gram matrix rounds small singular values; far less than bfloat16, in which torch iterates
    assert (found - expected).norm() <= 0.1 * torch.finfo(torch.bfloat16).eps * expected.norm()


def fitted(optimizer: str, dtype: str, steps: int = 60) -> tuple[nn.Module, list[float]]:
    """Return a model that learns to be another one, and its losses."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    model = nn.Sequential(layer, nn.LayerNorm(16))
    options = {"optimizer": optimizer, "optimizer_dtype": dtype, "learning_rate": 0.01}
    draft = Draft(model=model, shard=(layer,))
    optimizers = build_optimizers(draft, TrainConfig.model_validate(options))
    wanted, losses = torch.randn(16, 16), []
    for _ in range(steps):
        x = torch.randn(64, 16)
        loss = (model(x) - x @ wanted.softmax(1)).square().mean()
        loss.backward()
        for optim in optimizers:
            optim.step()
            optim.zero_grad()
        losses.append(loss.item())
    assert {
        value.dtype
        for optim in optimizers
        for state in optim.state.values()
        for value in state.values()
        if value.ndim
    } == {getattr(torch, dtype)}
    return model, losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_states_in_bfloat16_train_alike(optimizer: str) -> None:
    """The last ten losses are within 2 % of those with states in float32, and other ones."""
    (wide, exact), (narrow, rounded) = (fitted(optimizer, d) for d in ("float32", "bfloat16"))
    last, first = sum(exact[-10:]), sum(exact[:10])
    assert last < 0.5 * first
    assert sum(rounded[-10:]) == pytest.approx(last, rel=0.02)
    assert rounded[:2] == exact[:2]  # the first step's states are of no effect yet
    assert rounded != exact
    assert {p.dtype for p in narrow.parameters()} == {p.dtype for p in wide.parameters()}


def test_states_in_bfloat16_that_would_not_move_are_refused() -> None:
    config = TrainConfig(optimizer_dtype="bfloat16", betas=(0.9, 0.999))
    with pytest.raises(ConfigError, match=r"train.betas has 0.999.*Try: train.optimizer_dtype="):
        build_optimizers(Draft(model=nn.Linear(4, 4)), config)


def test_what_keeps_its_states_narrow_is_taken() -> None:
    class Mine(Narrow, torch.optim.SGD): ...

    config = TrainConfig(optimizer_dtype="bfloat16", optimizer="mine")
    check_kept([Mine([nn.Parameter(torch.ones(2))])], config)


def test_a_step_of_many_chunks_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = fitted("adamw", "bfloat16", 5)
    monkeypatch.setattr("specforge_core.train.optim.CHUNK", 1)
    assert fitted("adamw", "bfloat16", 5)[1] == whole


def test_ranks_that_no_shards_fill_are_refused() -> None:
    with world(torch.device("cpu")) as alone:
        assert shards_of(alone.mesh, None) is shards_of(alone.mesh, 1) is alone.mesh
        with pytest.raises(ConfigError, match=r"=2 does not divide the 1 rank.*shard_size=1"):
            shards_of(alone.mesh, 2)
