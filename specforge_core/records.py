"""A run's config as it may be written down and shown: without secrets.

Keys of servers, trackers and hubs come from the environment, or are pydantic's SecretStr in a
plugin's section.  The options of an engine are of any shape, so what looks like a secret there
is masked before a config is stored, printed or told to a tracker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from .config import RunConfig

MASK = "**********"
SHORTEST = 6  # characters of a secret that is taken out wherever it stands
ENVIRONMENT = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")  # ends of names there
# parts of a name, between dashes, underscores and capitals, that only secrets have
SECRET_WORDS = {
    *("token", "key", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "pwd"),
    *("auth", "authorization", "bearer", "credential", "credentials", "cookie", "cookies"),
    *("header", "headers"),
}
TOKEN_ID = re.compile(r"(?:mask|bos|eos|pad|unk)_token(?:_ids?)?$")  # of a vocabulary
WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")
# user and password of an address; and values that are secrets under whatever name
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
QUERY = re.compile(r"(?i)([?&][^=&#\s]*(?:token|key|secret|password|sig|auth)[^=&#\s]*=)[^&#\s]+")
KEYS = re.compile(
    r"(?i:\bbearer\s+)\S+|(?i:\bbasic\s+)(?=\S*[0-9+/=])[A-Za-z0-9+/=]{8,}"
    r"|\b(?:sk|pk|hf|ghp|gho|glpat|xox[a-z])[-_][A-Za-z0-9_-]{16,}"
)

_known: set[str] = set()


def recorded(run: RunConfig) -> dict[str, Any]:
    """Return a run's config as JSON, with its secrets masked."""
    return masked(run.model_dump(mode="json"))


def masked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, as JSON has it, with its secrets masked.

    By name only in what has no fixed names: the engine's options, and plugins' sections, whose
    authors may have forgotten.  Users and passwords of addresses anywhere.
    """
    found: dict[str, Any] = _values(config)
    target = found.get("target")
    if isinstance(target, dict) and "options" in target:
        found["target"] = {**target, "options": without_secrets(target["options"])}
    if "plugins" in found:
        found["plugins"] = without_secrets(found["plugins"])
    return found


def without_secrets(value: Any) -> Any:
    """Return a value of any shape without what is a secret by its name, or looks like one."""
    if isinstance(value, Mapping):
        return {
            key: MASK if inner and is_secret(str(key)) else without_secrets(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return KEYS.sub(MASK, _values(value)) if isinstance(value, str) else value


def secret_values(value: Any) -> list[str]:
    """Return what `without_secrets` masks by name, to be taken out of others' messages."""
    if isinstance(value, SecretStr):
        return [value.get_secret_value()]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in secret_values(inner)]
    if not isinstance(value, Mapping):
        return []
    found = []
    for key, inner in value.items():
        found += _leaves(inner) if is_secret(str(key)) else secret_values(inner)
    return found


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _leaves(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _leaves(inner)]
    if isinstance(value, SecretStr):
        return [value.get_secret_value()]
    return [str(value)] if value else []


def in_error(value: object, where: str) -> object:
    """Return what an error may show of the value at `where`, a dotted name of the config."""
    return MASK if any(map(is_secret, where.split("."))) else without_secrets(value)


def remember_secrets(run: RunConfig) -> None:
    """Note the secrets of a config, so that no message of this process shows them."""
    sections = [section.model_dump() for section in run.plugins.values()]
    for value in (run.target.options, *sections):
        _known.update(text for text in secret_values(value) if len(text) >= SHORTEST)


def _of_environment() -> set[str]:
    """Return the keys that servers, trackers and hubs read from the environment."""
    return {
        value
        for name, value in os.environ.items()
        if name.endswith(ENVIRONMENT) and len(value) >= SHORTEST and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long to be one
        return False


def in_message(text: str) -> str:
    """Return a message without the secrets that are known, and what looks like one."""
    known = _known | _of_environment()
    for secret in sorted(known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return str(without_secrets(text))


def override_in_error(override: str) -> str:
    """Return what an error may show of a KEY=VALUE that cannot be used."""
    key, _, _ = override.partition("=")
    hidden = f"{key.split()[0]}={MASK}" if key.split() and is_secret(key) else override
    return str(without_secrets(hidden))


def is_secret(name: str) -> bool:
    """Say whether a value of this name is a secret: `api_key` is, `mask_token_id` is not."""
    words = [word.lower() for word in WORDS.findall(TOKEN_ID.sub("", name))]
    return not SECRET_WORDS.isdisjoint(words)


def _values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_values(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return QUERY.sub(rf"\g<1>{MASK}", USER.sub(MASK, value))
