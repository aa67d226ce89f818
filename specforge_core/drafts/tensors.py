"""What a draft's stored tensors must be before they are taken: names, shapes, dtypes, values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError
from ..tensorfile import CODES
from ..text import cut, shorten
from .state import instead

# what a file whose header or layout is damaged makes its readers raise
DAMAGE = (
    *(SafetensorError, OSError, ValueError, TypeError),
    *(AttributeError, LookupError, RuntimeError),  # RecursionError is of the last kind
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_alike(outer: Mapping[str, Any], nested: Mapping[str, Any], key: str) -> None:
    """Raise CheckpointError where the section `key` of a config.json contradicts what is around it.

    One engine reads the one place, one the other.
    """
    for name in sorted(outer.keys() & nested.keys()):
        if outer[name] != nested[name]:
            raise CheckpointError(
                f"config.json of the export says {name} {outer[name]!r:.80}, and in {key} "
                f"{nested[name]!r:.80}: engines read one or the other. Export again"
            )


def check_written(config: Mapping[str, Any], written: Mapping[str, Any], within: str = "") -> None:
    """Raise CheckpointError at the first value of an export's config.json that is not as written.

    `written` is what its writer noted; `within` begins the names: those of a section.
    """
    for name in sorted(config.keys() | written.keys()):
        theirs, ours = config.get(name), written.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            check_written(theirs, ours, f"{within}{name}.")
        elif name not in config or name not in written or _json(theirs) != _json(ours):
            now = shorten(theirs) if name in config else "nothing"
            then = shorten(ours) if name in written else "nothing"
            raise CheckpointError(
                f"config.json of the export says {within}{cut(name)} {now}, and {then} was written "
                "with the weights. Put it back, or export again"
            )


def _json(value: Any) -> str:
    """Return a value as JSON: true is not 1 there, and 1.0 is not 1."""
    return json.dumps(value, sort_keys=True)


def check_options(
    options: Mapping[str, tuple[Any, Any]], of_target: Mapping[str, tuple[Any, Any]] | None = None
) -> None:
    """Raise CheckpointError at the first value of an export that is not this run's.

    Both map names to the export's value and this run's: `options` those of the section
    `strategy` (None: the export does not say it), `of_target` what the target decides.
    """
    for name, (theirs, ours) in options.items():
        if theirs != ours and theirs is None:
            raise CheckpointError(
                f"config.json of the export does not say {name}, which is {ours} in this run. "
                "Add it there as the draft was trained"
            )
        if theirs != ours:
            raise CheckpointError(
                f"the export has {name} {theirs}, this run {ours}. "
                f"Try: strategy.{name}={_typed(theirs)}"
            )
    for name, (theirs, ours) in (of_target or {}).items():
        if theirs != ours:
            raise CheckpointError(
                f"the export has {name} {theirs}, this run {ours}. Try the target it was trained "
                "for: target.path"
            )


def _typed(value: Any) -> str:
    """Return a value as one word of a command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return str(value)


def written(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return tensors as an export holds them: on the CPU, real numbers in torch's `dtype`."""
    real: torch.dtype = getattr(torch, dtype)
    own = {name: value.detach().to("cpu") for name, value in tensors.items()}
    return {
        name: (value.to(real) if value.is_floating_point() else value).contiguous()
        for name, value in own.items()
    }


def is_finite(value: Tensor) -> bool:
    """Say whether a tensor holds no NaN and no infinity.

    Where torch compares nothing (of 4 bits a value), it does not: such a draft is refused for that.
    """
    if not value.is_floating_point():
        return True
    with suppress(NotImplementedError):
        return bool((value.float() if value.itemsize < 2 else value).isfinite().all())
    return True


def check_finite(where: str, tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first tensor that holds a NaN or an infinity."""
    for name, value in tensors.items():
        own = value.to_local() if isinstance(value, DTensor) else value
        if not is_finite(own):
            raise CheckpointError(
                f"tensor {name!r} of {where} holds values that are not finite: nothing it drafts "
                "would be accepted. Use an earlier checkpoint"
            )


def check_given(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless an export's tensors are those of a draft.

    Names both ways, and shapes.  Floating point stays so, in any of the dtypes engines load;
    any other tensor has exactly the draft's dtype.
    """
    for name in sorted(own.keys() | given.keys()):
        ours, theirs = own.get(name), given.get(name)
        shapes = [None if t is None else tuple(t.shape) for t in (theirs, ours)]
        if ours is None or theirs is None or shapes[0] != shapes[1]:
            raise CheckpointError(
                f"export tensor {name!r} has shape {_or(shapes[0], 'none')}, this draft needs "
                f"{_or(shapes[1], 'no such tensor')}. Check strategy.* against its config.json"
            )
        if theirs.dtype not in (FLOATS if ours.is_floating_point() else (ours.dtype,)):
            raise CheckpointError(
                f"export tensor {name!r} has dtype {_plain(theirs.dtype)}, this draft needs "
                f"{_plain(ours.dtype)}. Export again, or use an unquantised draft"
            )


def check_stored(path: Path, wanted: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> None:
    """Compare a checkpoint's tensors, names below `prefixes`, with those of draft and optimizer.

    Raises CheckpointError naming the first one that is missing, left over, or of another shape
    or dtype.
    """
    stored: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, (code, ends) in _extents(file, path).items():
            before = stored.get(name, (code, ends))[1]
            stored[name] = code, [max(a, b) for a, b in zip(before, ends, strict=True)]
    left_over = [name for name in stored if name.startswith(prefixes) and name not in wanted]
    for name in [*wanted, *left_over]:
        tensor = wanted.get(name)
        if tensor is None:
            problem = "is in it, and not in this run's draft"
        elif name not in stored:
            problem = "is not in it"
        elif stored[name][1] != list(tensor.shape):
            problem = f"has shape {stored[name][1]} in it, and {list(tensor.shape)} in this run"
        elif stored[name][0] != CODES.get(tensor.dtype):
            problem = f"has dtype {stored[name][0]} in it, and {_plain(tensor.dtype)} in this run"
        else:
            continue
        raise CheckpointError(
            f"checkpoint {path} does not fit this run's draft: {name} {problem}. "
            "Use the strategy section it was trained with, or another output_dir"
        )


def _extents(file: Path, path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return each tensor's dtype code, and how far one rank's part of it reaches, per axis."""
    found = {}
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with safe_open(str(file), framework="pt") as tensors:
            layout = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                part = tensors.get_slice(name)
                shape = list(part.get_shape())
                offsets = layout.get(name, {}).get("saved_offsets") or [0] * len(shape)
                ends = [o + s for o, s in zip(offsets, shape, strict=True)]
                found[name] = str(part.get_dtype()), ends
    except DAMAGE as exc:
        raise CheckpointError(f"{file} is damaged: {exc}. {instead(path)}") from exc
    return found


def _or(shape: tuple[int, ...] | None, word: str) -> str:
    return word if shape is None else str(shape)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
