"""API keys: kept as hashes, compared in constant time, each with limits of its own.

ardiff api-key alice    # prints a new key once, and the entry for the file of keys
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from ardiff.config import build
from ardiff.data import storage
from ardiff.errors import ConfigError

ANONYMOUS = "anonymous"
POSITIONALS = ("name",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """What the file of keys says of one key."""

    sha256: str
    """The key's hash, 64 hex digits. Keys are 256 random bits, so a plain hash cannot be guessed back."""
    requests_per_minute: int | None = None
    """Videos that may be asked for in a minute; the service's default without."""
    jobs: int | None = None
    """Unfinished jobs; the service's default without."""
    streams: int | None = None
    """Open streams at one replica; the service's default without."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 must be 64 hex digits, as `ardiff api-key NAME` prints them")
        if any(limit is not None and limit < 1 for limit in (self.requests_per_minute, self.jobs, self.streams)):
            raise ValueError("requests_per_minute, jobs and streams must be at least 1")


class KeyLimits(NamedTuple):
    """What one key may have."""

    requests_per_minute: int
    jobs: int
    """Unfinished ones, on all replicas together."""
    streams: int
    """Open ones, at one replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKeyConfig:
    """A new key."""

    name: str = "default"
    """Whose key it is: letters, digits, ``-`` and ``_``."""

    def __post_init__(self) -> None:
        _check_name(self.name)


def run(config: ApiKeyConfig) -> None:
    """Prints a new key and its entry; nothing is stored."""
    key = f"ard-{secrets.token_urlsafe(32)}"
    print(f"# the key, shown this once: {key}\n# its entry in the file of keys:")
    print(yaml.safe_dump({config.name: {"sha256": digest(key)}}), end="")


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(place: str, may_be_empty: bool = False) -> dict[str, KeyEntry]:
    """The file of keys, YAML: a name, then its entry. Raises ConfigError or DataError."""
    try:
        tree: Any = yaml.safe_load(storage.read_bytes(place))
    except yaml.YAMLError as error:
        raise ConfigError(f"The file of keys {place} is not valid YAML.") from error
    if may_be_empty and tree in (None, {}):
        return {}
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"The file of keys {place} must map names to entries: see `ardiff api-key --help`.")
    for name, entry in tree.items():
        _check_name(name)
        if not isinstance(entry, dict):
            raise ConfigError(f"The entry of '{name}' in {place} must be a mapping with sha256.")
    return {name: build(KeyEntry, entry, name) for name, entry in tree.items()}


def find_owner(keys: dict[str, KeyEntry], key: str) -> str | None:
    """The name of a key. Looks at every entry, so that time tells nothing."""
    given, owner = digest(key), None
    for name, entry in keys.items():
        if hmac.compare_digest(given, entry.sha256):
            owner = name
    return owner


class RateLimiter:
    """A token bucket for each name: a minute's worth at once, refilled evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, when counted

    def wait(self, name: str, per_minute: int) -> float:
        """Takes a token and returns 0, or the seconds until there is one."""
        now = self._clock()
        tokens, counted = self._buckets.get(name, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - counted) * per_minute / 60)
        if tokens >= 1:
            self._buckets[name] = (tokens - 1, now)
            return 0.0
        self._buckets[name] = (tokens, now)
        return (1 - tokens) * 60 / per_minute


def _check_name(name: Any) -> None:
    # A name becomes part of places in storage.
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ConfigError(f"{name!r} is no name for a key: use 1 to 64 letters, digits, - and _.")
