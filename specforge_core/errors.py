"""Errors shown to the user without a traceback: what is wrong, which value, what to type next."""

from __future__ import annotations

import re

from .text import cut

LONGEST = 3000  # characters of a message


class SpecForgeError(Exception):
    """Base of every error a user is meant to read.  Exit status 2 unless a subclass says 1."""

    exit_code: int = 2

    def __str__(self) -> str:
        """Return the message; values of any length may be in it, and are cut."""
        words = re.sub(r"\S{500,}", lambda found: cut(found[0], 200), super().__str__())
        return cut(words, LONGEST)


class PluginError(SpecForgeError):
    """An installed plugin is missing, broken, duplicated or incompatible."""


class ConfigError(SpecForgeError):
    """The run config is wrong."""


class DataError(SpecForgeError):
    """A conversation or prompt file cannot be used."""


class CaptureError(SpecForgeError):
    """A capture is missing, damaged, or does not fit the run."""


class CheckpointError(SpecForgeError):
    """A checkpoint or export is missing, damaged, or does not fit the run."""


class RunError(SpecForgeError):
    """A run that was set up correctly failed while it ran."""

    exit_code: int = 1
