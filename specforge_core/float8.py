"""Matrix products in float8: `train.precision: fp8`.

A product sums over one dimension.  Each operand is cut into the lines that are summed over, and a
line is stored as float8 (e4m3: 4 bits of exponent, 3 of mantissa) with a scale of its own,
largest magnitude / 448.  A layer's three products (result, gradient of the input, gradient of the
weight) sum over three dimensions, so what two of them read is made by rows and by columns.
torch.compile fuses quantising one matrix by rows with what makes it, and calls the kernel that
multiplies; all else are operators that it leaves as they are.
Shapes: N rows, I and O the sizes of a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiled import opaque
from .errors import ConfigError
from .text import counted, cut
from .types import Draft, Float8Heads

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # that float8 holds
LEAST = 1e-30  # magnitude of a line: one of zeros has a scale, too
STEP = 16  # that the kernels want sizes to be multiples of


class Lines(NamedTuple):
    """A matrix [M, K] as `values * scales`."""

    values: Tensor  # [M, K] float8
    scales: Tensor  # [M, 1] float32


class Float8Weight(NamedTuple):
    """A weight [O, I] as the products with it read it: a constant."""

    rows: Lines  # [O, I], for the result
    columns: Lines  # [I, O], for the gradient of the input


def _empty(parts: Sequence[Tensor], rows: bool, columns: bool) -> tuple[Tensor, ...]:
    m, k = sum(part.shape[0] for part in parts), parts[0].shape[1]  # len() would fix them

    def empty(lines: int, length: int) -> tuple[Tensor, Tensor]:
        scales = parts[0].new_empty(lines, 1, dtype=torch.float32)
        return parts[0].new_empty(lines, length, dtype=FLOAT8), scales

    found = empty(m, k) if rows else ()
    return (*found, *empty(k, (m + STEP - 1) // STEP * STEP)) if columns else found


def _quantise(parts: Sequence[Tensor], rows: bool, columns: bool) -> tuple[Tensor, ...]:
    if parts[0].is_cuda:
        from .triton_float8 import narrow

        narrow(parts, found := _empty(parts, rows, columns), rows, columns)
        return found
    x = torch.cat(list(parts))
    if not x.numel():
        return _empty(parts, rows, columns)
    found = _narrow(x) if rows else ()
    return (*found, *_narrow(F.pad(x, (0, 0, 0, -len(x) % STEP)).t())) if columns else found


def _narrow(x: Tensor) -> Lines:
    wide = x.contiguous().float()  # the kernel reads lines, however x is laid out
    sizes = wide.abs().amax(1, keepdim=True).clamp(min=LEAST)
    # rounding may take the largest beyond what float8 holds, which would be NaN
    values = (wide * (LARGEST / sizes)).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return Lines(values, sizes / LARGEST)


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    if not (a.numel() and b.numel()):  # a sum over nothing; nor has anything set its scales
        return a.new_zeros(len(a), len(b), dtype=torch.bfloat16)
    if not a.is_cuda:
        wide = a.float() @ b.float().t()
        return (wide * a_scales * b_scales.t()).to(torch.bfloat16)
    return torch._scaled_mm(
        *(a, b.t()),
        scale_a=a_scales,
        scale_b=b_scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # without, kernels with a scale of each line gain little
    )


def _quantiser(name: str, rows: bool, columns: bool) -> Any:
    returned = ", ".join(["Tensor"] * 2 * (rows + columns))
    made, fake = (partial(f, rows=rows, columns=columns) for f in (_quantise, _empty))
    return opaque(f"specforge::float8_{name}(Tensor[] parts) -> ({returned})", made, fake)


_ROWS = _quantiser("rows", rows=True, columns=False)
_COLUMNS = _quantiser("columns", rows=False, columns=True)
_BOTH = _quantiser("both", rows=True, columns=True)
_PRODUCT = opaque(
    "specforge::float8_product(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales) -> Tensor",
    _product,
    lambda a, _, b, __: a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16),
)


def by_rows(*parts: Tensor) -> Lines:
    """Return matrices [., K] below each other, M lines together, in float8: [M, K].

    A line that holds an infinity or NaN gives products that are not finite.
    """
    if len(parts) == 1 and parts[0].numel() and torch.compiler.is_compiling():
        return _narrow(parts[0])
    return Lines(*_ROWS(parts))


def by_columns(*parts: Tensor) -> Lines:
    """Return the transpose of matrices below each other: [K, M up to a multiple of 16].

    Zeros are at the end.
    """
    return Lines(*_COLUMNS(parts))


def both(*parts: Tensor) -> tuple[Lines, Lines]:
    """Return matrices by rows and by columns, which takes less than one after the other."""
    found = _BOTH(parts)
    return Lines(*found[:2]), Lines(*found[2:])


def multiply(a: Lines, b: Lines) -> Tensor:
    """Return a [M, K] by the transpose of b [N, K], in bfloat16 (what the kernels give)."""
    kernel = a.values.is_cuda and torch.compiler.is_compiling()
    return (_product if kernel else _PRODUCT)(*a, *b)


def quantise_weight(weight: Tensor) -> Float8Weight:
    """Return a weight [O, I] in float8."""
    return Float8Weight(*both(weight.detach()))


def product(x: Tensor, weight: Float8Weight) -> Tensor:
    """Return x [..., I] by the transpose of a constant [O, I], in x's dtype; x has a gradient."""
    out: Tensor = _Constant.apply(_flat(x), *weight.rows, *weight.columns)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])


def products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return x [..., I] by the transpose of each weight [O, I] in x's dtype, computed in float8.

    They are one product: of the weights below each other, of all results' gradients beside each
    other.  Differentiable in x and the weights.
    """
    out: Tensor = _Trained.apply(_flat(x), *weights)  # type: ignore[no-untyped-call]
    outs = out.view(*x.shape[:-1], out.shape[-1])
    return torch.split(outs, [len(weight) for weight in weights], -1)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # a result has no gradient in torch 2.11's graphs where `to` did nothing
    return x if x.dtype == dtype else x.to(dtype)


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *lines: Tensor) -> Tensor:
        ctx.save_for_backward(*lines[2:])
        return _as(multiply(by_rows(x), Lines(*lines[:2])), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = Lines(*ctx.saved_tensors)
        return _as(multiply(by_rows(grad), columns), grad.dtype), *(None,) * 4


class _Trained(torch.autograd.Function):
    """Keeps what any product does.

    Columns are made in the backward pass, which costs a third reading, and saves a byte for each
    number of all layers' inputs (a compiler makes most of them again) and weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return _as(multiply(by_rows(x), by_rows(*weights)), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        reads, *trained = ctx.needs_input_grad
        rows, columns = both(grad)
        d_x = _as(multiply(rows, by_columns(*weights)), grad.dtype) if reads else None
        if not any(trained):
            return d_x, *(None,) * len(weights)
        d_weights = _as(multiply(columns, by_columns(x)), grad.dtype)
        parts = torch.split(d_weights, [len(weight) for weight in weights])
        return d_x, *(d if one else None for d, one in zip(parts, trained, strict=True))


class Float8Linear(nn.Linear):
    """A linear layer whose products are float8's in training; its weights stay as they are.

    Without gradients, in validation and drafting, it computes as what will be served: as any.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., O] for an input [..., I]."""
        return linears(input, self)[0]


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Return what linear layers give for one input [..., I]: in float8 by one product."""
    if not all(isinstance(layer, Float8Linear) for layer in layers):
        return tuple(layer(x) for layer in layers)
    if not torch.is_grad_enabled():
        return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)
    outs = products(x, *(layer.weight for layer in layers))
    return tuple(
        out if layer.bias is None else out + layer.bias
        for out, layer in zip(outs, layers, strict=True)
    )


def in_float8(module: nn.Module) -> bool:
    """Say whether the products of a draft, or a part of it, are to be in float8 just now."""
    return torch.is_grad_enabled() and any(isinstance(m, Float8Linear) for m in module.modules())


def fits(weight: Tensor) -> bool:
    """Say whether the kernels take the sizes of a weight."""
    return all(size % STEP == 0 for size in weight.shape)


def to_float8(draft: Draft, device: torch.device) -> None:
    """Have the linear layers of a draft's hidden units multiply in float8.

    What multiplies the weight of such a layer itself has to ask whether it is a `Float8Linear`;
    so does a train step of its heads, which are no hidden unit (`Float8Heads`, `in_float8`).
    Raises ConfigError where the device or a layer's sizes forbid it, or nothing would change.
    """
    back = "Try: train.precision=null"
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ConfigError(
            "train.precision=fp8 needs a GPU of compute capability 8.9 or more, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}. {back}"
        )
    names = {module: name for name, module in draft.model.named_modules()}
    modules = (module for unit in draft.hidden_units for module in unit.modules())
    layers = [module for module in dict.fromkeys(modules) if type(module) is nn.Linear]
    if not layers:
        raise ConfigError(
            "train.precision=fp8 is for the nn.Linear layers in what the draft calls its hidden "
            f"units (Draft.hidden, else compile, else shard), and there are none. {back}"
        )
    for layer in layers:
        if not fits(layer.weight):
            raise ConfigError(
                f"train.precision=fp8 multiplies by multiples of {STEP}, and {names[layer]} is "
                f"{layer.in_features} x {layer.out_features}. {back}"
            )
    for layer in layers:
        layer.__class__ = Float8Linear


def in_words(draft: Draft, step: object) -> str:
    """Say which products of a draft and its train step are in float8, and which are not."""
    layers = [module for module in draft.model.modules() if isinstance(module, Float8Linear)]
    heads = step.float8_heads(draft) if isinstance(step, Float8Heads) else {}
    given = [name for name, weight in heads.items() if fits(weight)]
    known = {id(weight) for weight in (*(layer.weight for layer in layers), *heads.values())}
    left = [n for n, p in draft.model.named_parameters() if p.ndim > 1 and id(p) not in known]
    left += [f"{name} (no multiples of {STEP})" for name in heads if name not in given]
    if draft.frozen is not None and known.isdisjoint(map(id, draft.frozen.parameters())):
        left.append("what is frozen")
    left = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in left))  # of all layers
    said = " and ".join([counted(len(layers), "linear layer"), *given])
    return f"in float8: {said}; not: {cut(', '.join(left) or 'nothing', 400)}"
