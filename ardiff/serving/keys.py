"""API keys: stored as hashes, compared in constant time, each with limits of its own.

ardiff api-key alice    # prints a new key and its entry for the key file
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from ardiff.config import build
from ardiff.data import storage
from ardiff.errors import ArdiffError, ConfigError
from ardiff.serving.config import ServiceConfig

logger = logging.getLogger(__name__)
ANONYMOUS = "anonymous"
POSITIONALS = ("name",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """The entry of a key in the key file."""

    sha256: str
    """SHA-256 of the key, 64 hex digits. Keys are 256 random bits, so their hashes need no salt."""
    requests_per_minute: int | None = None
    """Videos that may be requested per minute; None is the service's default."""
    jobs: int | None = None
    """Unfinished jobs; None is the service's default."""
    streams: int | None = None
    """Open streams on one replica; None is the service's default."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 must be 64 hex digits, as `ardiff api-key NAME` prints them")
        if any(limit is not None and limit < 1 for limit in (self.requests_per_minute, self.jobs, self.streams)):
            raise ValueError("requests_per_minute, jobs and streams must be at least 1")


class KeyLimits(NamedTuple):
    """Limits of one key."""

    requests_per_minute: int
    jobs: int
    """Unfinished jobs on all replicas together."""
    streams: int
    """Open streams on one replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKeyConfig:
    """A new key."""

    name: str = "default"
    """Name of the key's owner: letters, digits, ``-`` and ``_``."""

    def __post_init__(self) -> None:
        _check_name(self.name)


def run(config: ApiKeyConfig) -> None:
    """Prints a new key and its entry. Nothing is stored."""
    key = f"ard-{secrets.token_urlsafe(32)}"
    print(f"# the key, shown only once: {key}\n# its entry in the key file:")
    print(yaml.safe_dump({config.name: {"sha256": digest(key)}}), end="")


def digest(key: str) -> str:
    """The hash that is stored for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(uri: str, may_be_empty: bool = False) -> dict[str, KeyEntry]:
    """Reads the key file, YAML that maps names to entries. Raises ConfigError or DataError."""
    try:
        tree: Any = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise ConfigError(f"The key file {uri} is not valid YAML.") from error
    if may_be_empty and tree in (None, {}):
        return {}
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"The key file {uri} must map names to entries: see `ardiff api-key --help`.")
    for name, entry in tree.items():
        _check_name(name)
        if not isinstance(entry, dict):
            raise ConfigError(f"The entry of '{name}' in {uri} must be a mapping with sha256.")
    return {name: build(KeyEntry, entry, name) for name, entry in tree.items()}


def find_owner(keys: dict[str, KeyEntry], key: str) -> str | None:
    """The owner of a key, or None. Compares all entries, so that the time needed reveals nothing."""
    key_hash, owner = digest(key), None
    for name, entry in keys.items():
        if hmac.compare_digest(key_hash, entry.sha256):
            owner = name
    return owner


class ApiKeys:
    """The keys of a service, read again when their file changes."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises ConfigError or DataError if the key file cannot be read."""
        self._config = config
        self._entries = read_keys(config.keys) if config.keys else {}

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._config.keys)

    def owner_of(self, key: str) -> str | None:
        """The owner of a key, or None if it is not valid."""
        return find_owner(self._entries, key)

    def limits_of(self, owner: str) -> KeyLimits:
        """The limits in the owner's entry, or else the service's."""
        entry, config = self._entries.get(owner), self._config
        return KeyLimits(
            (entry and entry.requests_per_minute) or config.requests_per_minute,
            (entry and entry.jobs) or config.jobs_per_key,
            (entry and entry.streams) or config.streams_per_key,
        )

    async def reload(self) -> None:
        """Reads the key file again. On an error the keys stay as they are."""
        if self._config.keys:
            try:
                self._entries = await asyncio.to_thread(read_keys, self._config.keys, may_be_empty=True)
            except ArdiffError as error:
                logger.error("Reading the API keys again failed: %s", error)


class RateLimiter:
    """A token bucket per name: it holds one minute's requests and refills evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    def wait(self, name: str, per_minute: int) -> float:
        """Takes a token and returns 0, or returns the seconds until the next token."""
        now = self._clock()
        tokens, counted = self._buckets.get(name, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - counted) * per_minute / 60)
        if tokens >= 1:
            self._buckets[name] = (tokens - 1, now)
            return 0.0
        self._buckets[name] = (tokens, now)
        return (1 - tokens) * 60 / per_minute


def _check_name(name: Any) -> None:
    # A name becomes part of paths in storage.
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ConfigError(f"{name!r} is not a valid key name: use 1 to 64 letters, digits, - and _.")
