"""Whether a target's files and the model that transformers made of them are the same."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from ..progress import console
from ..types import TargetInfo
from .skeleton import find_parts
from .weights import NoSafetensors, tensor_dtypes


def stored_dtypes(info: TargetInfo) -> Mapping[str, str]:
    """Return each tensor's dtype code in the target's files; nothing for those of another format.

    Raises CaptureError for files that are damaged, or an index that leads elsewhere.
    """
    try:
        return tensor_dtypes(info)
    except NoSafetensors:
        return {}


def check_loaded(
    model: Any,
    report: Mapping[str, Any],
    info: TargetInfo,
    stored: Mapping[str, str],
    method: str | None,
) -> None:
    """Raise ConfigError for weights that are not in the files, or beside used ones and not used.

    transformers would go on: with random weights for the former; without, say, the scales of
    8-bit weights for the latter.  Whole modules that a text model has no use for are no error.
    """
    path = info.name_or_path
    _check_shapes(path, report["mismatched_keys"], method, info.vocab_size)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"target.path {path!r} lacks {len(missing)} of its weights, such as {missing[0]}. "
            "Download it again, or choose another target.path"
        )
    tied = info.config.get("tie_word_embeddings")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if tied and head is not None and head.weight is not embedding.weight:
        console.print(
            f"note: config.json of {path} says tie_word_embeddings, and its files have a head of "
            "their own, which is used here. A serving engine may take the embedding for it: set "
            "tie_word_embeddings to false in config.json"
        )
    own = model.state_dict()
    _check_layers(path, own.keys(), report["unexpected_keys"], len(find_parts(model).layers))
    if method is None:
        for name, code in stored.items():
            if (
                name in own
                and own[name].is_floating_point()
                and code[0] in "IUB"
                and code != "BF16"
            ):
                raise ConfigError(
                    f"target.path {path!r} has {name} in whole numbers ({code}) and no "
                    "quantization_config in its config.json that says what they stand for. "
                    "Try: target.path= its unquantised checkpoint"
                )
    unused = set(report["unexpected_keys"])
    used = (stored.keys() | own.keys()) - unused
    modules = {name.rpartition(".")[0] for name in used}
    if beside := sorted(n for n in unused if n.rpartition(".")[0] in modules or _inside(n, used)):
        why = (
            "If it is quantised, its config.json lacks the quantization_config that transformers "
            "reads; if they are of an adapter, merge it into the weights"
            if method is None
            else f"It is quantised ({method}), in another layout than transformers reads"
        )
        raise ConfigError(
            f"target.path {path!r} has {len(beside)} tensors that {type(model).__name__} does not "
            f"use beside others that it does, such as {beside[0]}: its states would be wrong. "
            f"{why}. Try: target.path= its unquantised checkpoint"
        )


def _check_layers(path: str, own: Collection[str], unused: Iterable[str], used: int) -> None:
    """Raise ConfigError for layers in the files, like those that run, that the config leaves out.

    Layers that predict further tokens stand behind the others, too, and have parts of their own.
    """
    behind: dict[str, set[str]] = {}  # of each layer beyond the last
    for name in unused:
        if (found := re.match(r"(.*?\.)(\d+)\.(.+)", name)) and int(found[2]) >= used:
            behind.setdefault(f"{found[1]}{found[2]}.", set()).add(found[3])
    for prefix, names in behind.items():
        last = re.sub(r"\d+\.$", f"{used - 1}.", prefix)
        if names == {name.removeprefix(last) for name in own if name.startswith(last)}:
            raise ConfigError(
                f"target.path {path!r} has weights of more layers ({prefix[:-1]}) than the {used} "
                "that num_hidden_layers in its config.json says, and like them: its states would "
                "be wrong. Correct it, or choose another target.path"
            )


def _inside(name: str, used: Collection[str]) -> bool:
    """Say whether a tensor is part of a module that has a weight of its own, as an adapter's is."""
    parts = name.split(".")
    return any(".".join((*parts[:end], "weight")) in used for end in range(1, len(parts) - 1))


def _check_shapes(
    path: str, mismatched: Iterable[tuple[str, Any, Any]], method: str | None, vocab_size: int
) -> None:
    """Raise ConfigError for a tensor of another shape than the config says: it is not loaded."""
    if not (wrong := sorted(mismatched)):
        return
    name, found, expected = wrong[0]
    if not method and found[1:] == expected[1:] and expected[0] == vocab_size:
        raise ConfigError(
            f"target.path {path!r} has {name} of {found[0]} rows, where the vocab_size in its "
            f"config.json is {vocab_size}. Correct the one or the other"
        )
    what = f"quantised ({method})" if method else "packed into fewer bits, or of another model"
    raise ConfigError(
        f"target.path {path!r} has {name} of shape {list(found)}, where its config.json needs "
        f"{list(expected)}; {len(wrong)} of its tensors do not fit. They are {what}, in a layout "
        "that transformers does not read. Try: target.path= its unquantised checkpoint"
    )
