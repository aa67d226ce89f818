"""Write and read exported drafts: config.json, safetensors weights, provenance.json.

An export appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checksums import check_folder, check_seal, checksum, file_checksum, folder_checksums, sealed
from ..documents import check_regular, read_object
from ..errors import CheckpointError, PluginError
from ..files import publish, refusing, sweep, system_error, temporary_folder, write_file
from ..packages import versions
from ..types import Export
from .links import run_of
from .serve_options import PLAIN_NAME, found_options, stored_options
from .tensors import check_finite, is_finite

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROVENANCE = "provenance.json"
WRITTEN = "written"  # in it: config.json as it was written
SHARD_BYTES = 5_000_000_000
PACKAGES = ("specforge-core", "torch", "transformers", "safetensors")


def write_export(
    export: Export,
    directory: Path,
    provenance: Mapping[str, Any],
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an export as a new directory.

    `provenance` says where the draft comes from: strategy, target, revision,
    layers, fingerprints; the versions of the packages are added, and what serving
    engines and the doctor have to know: `serve`, `environment`, `causes`, `base`, the names of
    the other `files`, config.json as it is `written`, and the `checksums` of weights, those
    files and itself.  An existing directory is replaced only with `force`, and only when all of
    its files are an export's.  Raises CheckpointError when the directory is taken or cannot be
    written, PluginError when what the strategy returned cannot be saved.
    """
    advice = "Make room there, or choose another place with -o"
    with refusing(CheckpointError, advice, directory):
        directory = Path(os.path.realpath(directory))  # which takes a link to itself as it is
        check_place(directory, force=force)
    _check_names(export.files)
    weights = _plain(export.weights)
    told: dict[str, Any] = {
        "serve": {engine: stored_options(flags, export) for engine, flags in export.serve.items()},
        "environment": {engine: dict(names) for engine, names in export.environment.items()},
        "causes": dict(export.causes),
        "base": export.base,
        "files": sorted(export.files),
        WRITTEN: dict(export.config),
    }
    told = {**provenance, **told, "packages": versions(*PACKAGES), "checksums": {}}
    files = {**export.files, CONFIG: _json(export.config, CONFIG).encode()}
    _json(told, PROVENANCE)  # before anything is written
    with refusing(CheckpointError, advice, directory):
        sweep(directory.parent)
        with temporary_folder(directory) as beside:
            _write_weights(weights, beside, shard_bytes)
            own = {name: checksum(data) for name, data in export.files.items()}
            index = {INDEX: file_checksum(beside / INDEX)} if (beside / INDEX).exists() else {}
            told["checksums"] = folder_checksums(beside) | index | own
            files[PROVENANCE] = _json(sealed(told), PROVENANCE).encode()
            for name, data in files.items():
                write_file(beside / name, data)
            publish(beside, directory)


def check_place(directory: Path, *, force: bool) -> None:
    """Raise CheckpointError unless an export may be written here."""
    if os.path.lexists(directory) and not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder. Choose another place with -o")
    if run := run_of(directory):
        raise CheckpointError(
            f"{directory} belongs to the run in {run}, which removes what is no checkpoint. "
            f"Choose another place with -o, such as {run}/export"
        )
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    own = _own_files(directory) if PROVENANCE in names else set()
    strange = sorted(
        name for name in names if not (_is_ours(name) or name in own) or (directory / name).is_dir()
    )
    if strange or (names and PROVENANCE not in names):
        found = strange[0] if strange else f"no {PROVENANCE}"
        raise CheckpointError(
            f"{directory} is not empty and not an export ({found}). Choose another place with -o"
        )
    if names and not force:
        raise CheckpointError(
            f"{directory} already holds an export. Replace it with --force, or choose another -o"
        )


def read_export(directory: Path, provenance: Mapping[str, Any] | None = None) -> Export:
    """Read a directory's config and weights; only safetensors files are opened.

    `provenance` is what `read_provenance` gave, where that was asked before.  Raises
    CheckpointError when something is missing, damaged, not finite or does not agree.
    """
    config = read_json(directory, CONFIG)
    check_export(directory, read_provenance(directory) if provenance is None else provenance)
    weights = _read_all_weights(directory)
    check_finite(str(directory), weights)
    return Export(config=config, weights=weights)


def _read_all_weights(directory: Path) -> dict[str, Tensor]:
    """Return the weights of one file, or of all that an index names."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory, INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX} has no weight_map. Export again")
        files = sorted({Path(str(name)).name for name in weight_map.values()})
        weights: dict[str, Tensor] = {}
        for name in files:
            weights |= _read_weights(directory / name)
        if missing := sorted(weight_map.keys() - weights.keys()):
            raise CheckpointError(
                f"{directory} lacks tensor {missing[0]!r}, which {INDEX} lists. Export again"
            )
        return weights
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled and not (directory / WEIGHTS).is_file():
        raise CheckpointError(
            f"{directory} holds its weights as {pickled[0]}, a pickle, which can run code and is "
            f"never read. Convert it to {WEIGHTS} first"
        )
    return _read_weights(directory / WEIGHTS)


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return what an export says of where it comes from; nothing for one of another tool.

    Raises CheckpointError when its provenance.json is damaged.
    """
    there = os.path.lexists(directory / PROVENANCE)  # a link to nothing is damage
    return read_json(directory, PROVENANCE) if there else {}


def check_export(directory: Path, provenance: Mapping[str, Any]) -> bool:
    """Read an export's weights and other files whole and compare their checksums.

    Returns False where it has none: another program or version wrote it.  Raises CheckpointError.
    """
    checksums = provenance.get("checksums", {})
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{directory / PROVENANCE}: checksums is no object. Export again")
    others = [n for n in checksums if n == INDEX or (PLAIN_NAME.fullmatch(n) and not _is_ours(n))]
    check_folder(directory, checksums, "Export again", others)
    return bool(checksums)


def read_serve(directory: Path, engine: str) -> dict[str, Any] | None:
    """Return the options that an engine needs to serve an export; None where it names none.

    Files of the export come as their paths here.
    Raises CheckpointError when its provenance.json is missing or damaged, or such a file is.
    """
    serve = read_json(directory, PROVENANCE).get("serve") or {}
    flags = serve.get(engine) if isinstance(serve, dict) else None
    if flags is not None and not isinstance(flags, dict):
        raise CheckpointError(
            f"{directory / PROVENANCE} has no options under serve.{engine}. Export again"
        )
    return None if flags is None else found_options(flags, directory)


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that can be saved: on the CPU, contiguous, none sharing memory."""
    if not weights:
        raise PluginError("the strategy's export has no weights. Its specforge_export is wrong")
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"tensor {name!r} holds values that are not finite: this draft cannot serve. "
                "Export an earlier checkpoint"
            )
        saved = tensor.detach().cpu().contiguous()
        place = saved.untyped_storage().data_ptr()
        plain[name] = saved.clone() if place in seen else saved
        seen.add(place)
    return plain


def _write_weights(weights: Mapping[str, Tensor], directory: Path, shard_bytes: int) -> None:
    shards = list(_shards(weights, shard_bytes))
    if len(shards) == 1:
        _write_shard(shards[0], directory / WEIGHTS)
        return
    stem = WEIGHTS.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_file(directory / INDEX, _json(index, INDEX).encode())


def _shards(weights: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Split into parts of at most `shard_bytes`; a larger tensor is a part by itself."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if part and size + tensor.nbytes > shard_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _write_shard(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as exc:
        raise system_error(exc, path) from exc
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_names(files: Mapping[str, bytes]) -> None:
    """Raise PluginError for a file that is not beside the others, or is one of them."""
    for name in files:
        if not PLAIN_NAME.fullmatch(name) or _is_ours(name):
            raise PluginError(
                f"the strategy's export has a file called {name!r}: a plain name that is none of "
                f"{CONFIG}, {WEIGHTS}, {PROVENANCE} is needed. Its specforge_export is wrong"
            )


def _own_files(directory: Path) -> set[str]:
    """Return the names of an export's other files; none where a damaged one is to be replaced."""
    with suppress(OSError, ValueError):
        found = read_object(directory / PROVENANCE).get("files", [])
        return {str(name) for name in found} if isinstance(found, list) else set()
    return set()


def _is_ours(name: str) -> bool:
    weights = name.startswith("model") and name.endswith(".safetensors")
    return weights or name in (CONFIG, INDEX, PROVENANCE)


def _json(value: Mapping[str, Any], file: str) -> str:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as exc:
        raise PluginError(f"{file} of the export is not JSON: {exc}") from exc


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Return the object in a file of an export.  Raises CheckpointError."""
    path = directory / name
    try:
        found = read_object(path)
        if name == PROVENANCE:
            check_seal(found)
        return found
    except OSError as exc:
        raise CheckpointError(
            f"{directory} is not an exported draft: {name} cannot be read ({exc.strerror}). "
            "Try: specforge export --checkpoint OUTPUT_DIR -o DIR"
        ) from exc
    except ValueError as exc:
        raise CheckpointError(f"{path} is damaged: {exc}. Export again") from exc


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        check_regular(path)
        found: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path} is missing. Export again") from exc
    except (OSError, ValueError, SafetensorError) as exc:  # ValueError: no file has such a name
        raise CheckpointError(f"{str(path)!r:.300} is damaged: {exc}. Export again") from exc
    return found
