"""PyArrow's file system of Google Cloud Storage, for ``gs://`` URIs.

Credentials are Google's application default ones, such as ``GOOGLE_APPLICATION_CREDENTIALS`` or those of the instance.
"""

import os
from datetime import timedelta
from functools import lru_cache

import pyarrow.fs as pafs

from ardiff.data import s3

EMULATOR = "STORAGE_EMULATOR_HOST"
"""Environment variable of Google's libraries with the URL of a server other than Google's."""
_SDK_SECONDS = 10.0
"""Seconds for which Google's library retries on its own."""


def filesystem(retry: bool = False) -> pafs.GcsFileSystem:
    """The file system. ``retry`` is for code that does not retry on its own: it retries ``storage.retry_seconds``."""
    config = s3.current()
    seconds = max(config.retry_seconds, _SDK_SECONDS) if retry else _SDK_SECONDS
    return _filesystem(config.anonymous, os.environ.get(EMULATOR, ""), seconds)


@lru_cache(maxsize=8)
def _filesystem(anonymous: bool, emulator: str, seconds: float) -> pafs.GcsFileSystem:
    scheme, _, host = emulator.rpartition("://")
    return pafs.GcsFileSystem(
        anonymous=anonymous,
        scheme=scheme or ("http" if host else "https"),
        endpoint_override=host.rstrip("/") or None,
        retry_time_limit=timedelta(seconds=seconds),
    )
