"""Products in float8, against the same rule in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_core.float8 import (
    Lines,
    both,
    by_columns,
    by_rows,
    multiply,
    product,
    products,
    quantise_weight,
)
from specforge_core.nn.linear_cross_entropy import linear_cross_entropy
from specforge_core.nn.linear_soft_cross_entropy import linear_soft_cross_entropy

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


def assert_kept(lines: Lines, x: Tensor) -> None:
    """Assert that each number of a matrix is one of float8's nearest, and zeros are behind it.

    The rule computes in float32, the GPU with a quotient that is not rounded exactly: where a
    number falls between two of float8 is off by 1e-6 of itself, 16 steps at most, and one in some
    hundred of bfloat16 is right between two of them.  So either is right there, and nowhere else.
    """
    scales = x.double().abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(lines.scales.double(), scales, rtol=1e-6, atol=0)
    found, wide = lines.values.double(), x.double() / scales
    steps = 2.0 ** (wide.abs().clamp(min=2**-6).log2().floor() - 3)
    off = (found[:, : wide.shape[1]] - wide) / steps
    assert bool((off.abs() <= 0.5 + 2e-5).all())
    assert not found[:, wide.shape[1] :].any()


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


def test_several_weights_of_one_input_are_one_product() -> None:
    x = draws(16, 64, seed=0).requires_grad_()
    weights = [draws(n, 64, seed=n).requires_grad_() for n in (96, 32)]
    whole = torch.cat(weights).detach().requires_grad_()
    outs, (out,) = products(x, *weights), products(x, whole)
    assert torch.equal(torch.cat(outs, -1), out)
    constant = product(x, quantise_weight(whole))
    assert torch.equal(constant, out)
    grad = draws(16, 128, seed=2)
    d_x, *d_weights = torch.autograd.grad(outs, (x, *weights), grad.split([96, 32], -1))
    d_whole = torch.autograd.grad(out, (x, whole), grad)
    assert torch.equal(d_x, d_whole[0])
    assert torch.equal(torch.cat(d_weights), d_whole[1])
    assert torch.equal(d_x, torch.autograd.grad(constant, x, grad)[0])
    # a single line, as nn.Linear takes it
    assert torch.equal(products(x[3], *weights)[1], outs[1][3])
    assert torch.equal(product(x[3], quantise_weight(whole)), out[3])
    weights[0].requires_grad_(False)
    again = torch.autograd.grad(products(x, *weights), weights[1:], grad.split([96, 32], -1))
    assert torch.equal(again[0], d_weights[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(16,), (37,), (160, 0, 53), (0,)])
def test_matrices_below_each_other_are_one(device: str, counts: tuple[int, ...]) -> None:
    x = draws(sum(counts), 144, seed=0, device=device)
    rows, columns = both(*x.split(counts))
    alone = by_rows(*x.split(counts)), by_columns(*x.split(counts))
    if x.numel():
        for row, column in ((rows, columns), alone):
            assert_kept(row, x)
            assert_kept(column, x.t())
    assert [lines.values.shape for lines in alone] == [rows.values.shape, columns.values.shape]
    assert columns.values.shape[1] % 16 == 0
    assert multiply(columns, columns).shape == (144, 144)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_any_size_are_kept(device: str, size: float) -> None:
    x = draws(4, 64, seed=0, device=device).float() * size
    values, scales = by_rows(x)
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


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_result_and_gradients_of_zero(device: str) -> None:
    weight = torch.ones(16, 32, device=device, requires_grad=True)
    (out,) = products(torch.ones(0, 32, device=device), weight)
    assert out.shape == (0, 16)
    (d_weight,) = torch.autograd.grad(out.sum(), weight)
    assert torch.equal(d_weight, torch.zeros_like(weight))
    values, scales = by_columns(torch.ones(0, 32, device=device))
    nothing = Lines(values, torch.full_like(scales, torch.nan))  # its scales may be anything
    assert not multiply(nothing, nothing).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 100.0])
def test_a_frozen_head_gives_what_float8_keeps_of_it(device: str, softcap: float | None) -> None:
    hidden = draws(37, 64, seed=0, device=device).div(8).requires_grad_()
    weight = draws(480, 64, seed=1, device=device)
    labels = torch.arange(0, 370, 10, device=device)
    losses, _ = linear_cross_entropy(
        *(hidden, weight, labels), softcap=softcap, chunk=16, float8=by_rows(weight)
    )
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    logits = (exact(hidden.detach()) @ exact(weight).t()).bfloat16().double().requires_grad_()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = torch.nn.functional.cross_entropy(capped, labels, reduction="none")
    (d_logits,) = torch.autograd.grad(wanted.sum(), logits)
    assert relative(losses.detach(), wanted.detach()) < ROUNDED
    assert relative(grad, d_logits @ weight.double()) < ROUNDED


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trained_head_is_near_the_one_that_is_not_in_float8(
    device: str, dtype: torch.dtype
) -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = (12, 3, 64), (480, 64), (12, 64), (480, 64)
    drawn = (torch.randn(shape, generator=gen).div(2).to(device, dtype) for shape in shapes)
    hidden, weight, *teacher = drawn
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = []
    for ready in (by_rows(weight.detach()), None):
        total, _ = linear_soft_cross_entropy(
            *leaves, *teacher, torch.ones(12, 3, device=device), chunk=16, float8=ready
        )
        found.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for narrow, wide in zip(*found, strict=True):
        assert 1e-5 < relative(narrow, wide) < 0.1
