"""Options to serve an export with, some of which are files of the export itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PluginError
from ..types import Export, ExportFile

NAMED = "file_of_export"  # how provenance.json writes an ExportFile: {NAMED: name}
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def stored_options(flags: Mapping[str, Any], export: Export) -> dict[str, Any]:
    """Return options as JSON holds them.  Raises PluginError for a file that there is not."""
    for key, value in flags.items():
        if isinstance(value, ExportFile) and value.name not in export.files:
            raise PluginError(
                f"the strategy's export has no file {value.name!r}, which its serve names as "
                f"{key}: it has {sorted(export.files)}. Its specforge_export is wrong"
            )
    return {k: {NAMED: v.name} if isinstance(v, ExportFile) else v for k, v in flags.items()}


def found_options(flags: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return stored options, with the paths of files in `directory`, whoever wrote them.

    Raises CheckpointError for a file that is not there.
    """
    return {key: _found(value, directory) for key, value in flags.items()}


def _found(value: Any, directory: Path) -> Any:
    if not isinstance(value, dict) or value.keys() != {NAMED}:
        return value
    name = str(value[NAMED])
    if not PLAIN_NAME.fullmatch(name) or not (directory / name).is_file():
        raise CheckpointError(f"{directory} has no file {name!r} to serve with. Export again")
    return str((directory / name).resolve())
