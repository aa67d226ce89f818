"""How layers are compiled: once, for every length, and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable; a user's is left as it is
_LIBRARIES: dict[str, torch.library.Library] = {}  # what they define goes with them


def compile_units(
    units: Iterable[nn.Module], backend: str | Any = "inductor", *, inner: bool = False
) -> None:
    """Compile modules in place, at their first call; `inner`: without what their hooks do.

    All lengths are symbols from the start, two that happen to be equal stay two, and no kernel is
    chosen by comparing them with a number: so batches of any length share a graph, and ranks
    whose batches differ in length do not compile in turn.  What a backward pass can make again
    from what is kept anyway, in the pass that reads it, is not kept: an MLP's inner product and
    normed states.
    """
    how = _how(backend)
    for unit in units:
        if inner:
            unit.forward = torch.compile(unit.forward, **how)
        else:
            unit.compile(**how)


def compiled(function: Callable[..., Any], backend: str | Any = "inductor") -> Callable[..., Any]:
    """Return a function that is compiled at its first call, as `compile_units` says."""
    return torch.compile(function, **_how(backend))


def opaque(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Return an operator that torch.compile leaves as it is: `function` on CPUs and on GPUs.

    schema: torch's, as `package::name(Tensor x, int n) -> Tensor`.  fake: says, with the same
    arguments, which shapes come out.  What the function reads it must not return or change.
    Differentiable once `torch.library.register_autograd` says how.
    `torch.library.custom_op` does more for its users, and takes 0.18 ms of the host for each call.
    """
    space, _, rest = schema.partition("::")
    name = rest.partition("(")[0]
    if space not in _LIBRARIES:
        _LIBRARIES[space] = torch.library.Library(space, "FRAGMENT")  # type: ignore[no-untyped-call]
    library = _LIBRARIES[space]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    library.define(rest, tags=tags)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        library.impl(name, function, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{space}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, space), name).default


def _how(backend: str | Any) -> dict[str, Any]:
    """Set what torch has as globals; return the arguments of torch.compile."""
    os.environ.setdefault(CACHE, str(Path.home() / ".cache" / "specforge" / "compile"))
    import torch._dynamo.config as tracing
    import torch._functorch.config as partitioner
    import torch.fx.experimental._config as symbols

    # an epsilon as a symbol is found out to be none only when all is traced, which is done again
    if hasattr(tracing, "specialize_float"):
        tracing.specialize_float = True
    if hasattr(partitioner, "ban_recompute_materialized_backward"):
        partitioner.ban_recompute_materialized_backward = False
    if hasattr(symbols, "use_duck_shape"):
        symbols.use_duck_shape = False
    options = None
    if backend == "inductor":
        options = _options()
        _trace_once()
    return {"backend": backend, "dynamic": True, "options": options}


@contextmanager
def swapped(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other forwards for the length of a `with`."""
    before = [(module, vars(module).get("forward")) for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


def recompute_units(units: Iterable[nn.Module]) -> None:
    """Have modules keep their inputs alone, and be made again in the backward pass.

    This stands around what is compiled, and FSDP's hooks around this: they gather weights and cast
    inputs once, for both times.
    """
    for unit in units:
        unit.forward = partial(_twice, unit.forward)


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _trace_once() -> None:
    """Have inductor trace now what it traces once in a process, at the first graph otherwise.

    For as long as that lasts a call of any module in any thread is taken for a part of it and
    fails: so a target that captures beside the first training step would.
    """
    from torch._inductor import loop_body

    trace = getattr(getattr(loop_body, "InterpreterShim", None), "_dummy_gm", None)
    if trace is not None:
        trace()


def _options() -> dict[str, Any]:
    """Return inductor's options, as far as this torch has them.

    Sums over rows and over columns are fused into one kernel where that is quicker, which
    depends on the number of rows; without its checks of size it is done for any number.
    """
    import torch._inductor.config as inductor

    known = inductor.get_config_copy() if hasattr(inductor, "get_config_copy") else {}
    loose, fusion = (
        "triton.mix_order_reduction_non_strict_mode",
        "triton.mix_order_reduction",
    )
    if loose in known:
        return {loose: True}
    return {fusion: False} if fusion in known else {}
