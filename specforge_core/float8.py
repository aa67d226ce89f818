"""Matrix products in float8: `train.precision: fp8`.

A product sums over one dimension.  Each operand is cut into the lines that are summed over, and a
line is stored as float8 (e4m3: 4 bits of exponent, 3 of mantissa) with a scale of its own,
largest magnitude / 448.  A layer's three products (result, gradient of the input, gradient of the
weight) sum over three dimensions, so what two of them read is kept by rows and by columns.
Both steps are operators that torch.compile leaves as they are.
Shapes: N rows, I and O the sizes of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@torch.library.custom_op("specforge::float8_lines", mutates_args=())
def _lines(
    parts: Sequence[Tensor], rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _empty(parts, rows, columns)
    if parts[0].is_cuda:
        from .triton_float8 import narrow

        narrow(parts, found[:2] if rows else None, found[2:] if columns else None)
        return found
    x = torch.cat(list(parts)).float()
    for wanted, lines, (values, scales) in (
        (rows, x, found[:2]),
        (columns, x.t(), found[2:]),
    ):
        if wanted and lines.numel():
            scales.copy_(lines.abs().amax(1, keepdim=True).clamp(min=LEAST))
            values.zero_()[:, : lines.shape[1]] = _narrow(lines * (LARGEST / scales))
            scales.div_(LARGEST)
    return found


def _narrow(x: Tensor) -> Tensor:
    # rounding may take the largest beyond what float8 holds, which would be NaN
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


@_lines.register_fake
def _empty(
    parts: Sequence[Tensor], rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = sum(part.shape[0] for part in parts), parts[0].shape[1]  # len() would fix them
    padded = (m + STEP - 1) // STEP * STEP

    def empty(lines: int, length: int) -> tuple[Tensor, Tensor]:
        values = parts[0].new_empty(lines, length, dtype=FLOAT8)
        return values, parts[0].new_empty(lines, 1, dtype=torch.float32)

    return *empty(m if rows else 0, k), *empty(k if columns else 0, padded)


def quantise(*parts: Tensor, rows: bool = True, columns: bool = True) -> tuple[Lines, Lines]:
    """Return matrices [., K] below each other, M lines together, by rows and by columns.

    The second is [K, M rounded up to a multiple of 16], zeros at the end.  What is not asked for
    is empty.  A line that holds an infinity or NaN gives products that are not finite.
    """
    found = _lines(parts, rows, columns)
    return Lines(*found[:2]), Lines(*found[2:])


@torch.library.custom_op("specforge::float8_product", mutates_args=())
def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    if not a.is_cuda:
        wide = a.float() @ b.float().t()
        return (wide * a_scales * b_scales.t()).to(torch.bfloat16)
    if not (a.numel() and b.numel()):
        return a.new_zeros(len(a), len(b), dtype=torch.bfloat16)
    return torch._scaled_mm(
        *(a, b.t()),
        scale_a=a_scales,
        scale_b=b_scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # without, kernels with a scale of each line gain little
    )


@_product.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.bfloat16)


def multiply(a: Lines, b: Lines) -> Tensor:
    """Return a [M, K] by the transpose of b [N, K], in bfloat16 (what the kernels give)."""
    found: Tensor = _product(*a, *b)
    return found


def quantise_weight(weight: Tensor) -> Float8Weight:
    """Return a weight [O, I] in float8."""
    return Float8Weight(*quantise(weight.detach()))


def products(x: Tensor, *weights: Tensor | Float8Weight) -> tuple[Tensor, ...]:
    """Return x [..., I] by the transpose of each weight [O, I] in x's dtype, computed in float8.

    Differentiable in x, which is quantised once, and in weights that are tensors.  Products at
    several places with one weight may share what `quantise_weight` makes of it.
    """
    trained = [None if isinstance(weight, Float8Weight) else weight for weight in weights]
    ready = [w if isinstance(w, Float8Weight) else quantise_weight(w) for w in weights]
    given = (part for weight in ready for lines in weight for part in lines)
    outs = _Products.apply(x.flatten(0, -2), *trained, *given)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


class _Products(torch.autograd.Function):
    """Of n weights, behind x: n that are trained or None, and 4 tensors of each in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        count = len(given) // 5
        lines: Any = given[count:]
        rows, columns = quantise(x, columns=any(ctx.needs_input_grad[1 : 1 + count]))
        read = [lines[4 * i + j] for i in range(count) for j in (2, 3)]
        ctx.save_for_backward(*columns, *read)
        return tuple(
            multiply(rows, Lines(lines[i], lines[i + 1])).to(x.dtype)
            for i in range(0, 4 * count, 4)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        columns, count = Lines(*saved[:2]), len(grads)
        d_x: Tensor | None = None
        d_weights: list[Tensor | None] = []
        for i, grad in enumerate(grads):
            trained = ctx.needs_input_grad[1 + i]
            by_rows, by_columns = quantise(grad, rows=ctx.needs_input_grad[0], columns=trained)
            if ctx.needs_input_grad[0]:
                part = multiply(by_rows, Lines(*saved[2 + 2 * i : 4 + 2 * i])).to(grad.dtype)
                d_x = part if d_x is None else d_x + part
            d_weights.append(multiply(by_columns, columns).to(grad.dtype) if trained else None)
        return d_x, *d_weights, *(None,) * (4 * count)


class Float8Linear(nn.Linear):
    """A linear layer whose products are float8's in training; its weights stay as they are.

    Without gradients, in validation and drafting, it computes as what will be served: as any.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., O] for an input [..., I]."""
        return linears(input, self)[0]


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Return what linear layers give for one input [..., I]: in float8 it is quantised once."""
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
    return not any(size % STEP for size in weight.shape)


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
    modules = {module: None for unit in draft.hidden_units for module in unit.modules()}
    layers = [module for module in modules if type(module) is nn.Linear]
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
    said = " and ".join([counted(len(layers), "linear layer"), *given])
    return f"in float8: {said}; not: {cut(', '.join(left) or 'nothing', 200)}"
