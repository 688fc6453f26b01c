"""How S3 is reached: one section of configuration, the clients made of it, and which of their errors are passing ones.

The section travels as environment variables, so every process of a job, on whatever node, makes the same clients of it.
Secrets are no part of it: credentials come from the standard AWS variables, profiles and instance roles of each node.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import boto3
import pyarrow.fs as pafs
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from ardiff.data.config import STORAGE_VARIABLE, StorageConfig

SDK_ATTEMPTS = 3
"""Attempts that the AWS libraries make by themselves, within about a second."""
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
"""Some stores that are not AWS refuse or corrupt uploads with the newer default of PyArrow's checksums."""
_TRANSIENT_CODES = re.compile(
    "SlowDown|Throttl|RequestLimitExceeded|RequestTimeout|InternalError|ServiceUnavailable|OperationAborted|BadDigest"
)
_TRANSIENT_TEXT = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|INTERNAL_FAILURE|SERVICE_UNAVAILABLE)"
    r"|HTTP status (429|5\d\d)"
)
_TRANSIENT_ERRNO = {errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN, errno.ESTALE}


def configure(config: StorageConfig) -> None:
    """Makes ``config`` the settings of this process and of those that it starts."""
    os.environ.update(config.environment())


def current() -> StorageConfig:
    """The settings of this process."""
    return StorageConfig(**json.loads(os.environ.get(STORAGE_VARIABLE, "{}")))


def filesystem(bucket: str, patient: bool = False) -> pafs.S3FileSystem:
    """PyArrow's view of S3, for Parquet and copies. ``bucket`` matters to AWS alone, whose regions differ.

    ``patient`` is for code that knows no second try: requests themselves are repeated for about
    ``storage.retry_seconds``, and also where the file system is sent to.
    """
    os.environ.setdefault(*CHECKSUMS)
    if not patient:
        return _filesystem(current(), _region(bucket), _variables())
    return PatientS3FileSystem(bucket, _options(current(), _region(bucket)))


class PatientS3FileSystem(pafs.S3FileSystem):
    """An S3 file system that keeps its patience when it is pickled, as PyArrow's own does not (26.0)."""

    def __new__(cls, bucket: str, options: dict[str, Any]) -> "PatientS3FileSystem":
        return super().__new__(cls)

    def __init__(self, bucket: str, options: dict[str, Any]) -> None:
        # Pauses double up to 20 seconds: 8 attempts were seen to take 53 seconds.
        attempts = 5 + math.ceil(current().retry_seconds / 15)
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts))
        self.bucket = bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return filesystem, (self.bucket, True)


def client() -> Any:
    """The boto3 client, for everything else."""
    return _client(current(), _variables())


def objects(bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Key, size and etag of everything whose key begins with ``prefix``, in S3's order. Needs the right to list."""
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            yield found["Key"], found["Size"], found["ETag"].strip('"')


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    match error:
        case ClientError():
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(error.response.get("Error", {}).get("Code", ""))
            return status in (429, 500, 502, 503, 504) or bool(_TRANSIENT_CODES.search(code))
        case BotoCoreError():
            return isinstance(error, NoConnectionError | HTTPClientError | IncompleteReadError | ResponseStreamingError)
        case OSError():
            return error.errno in _TRANSIENT_ERRNO or bool(_TRANSIENT_TEXT.search(str(error)))
    return False


def endpoint() -> str:
    """The URL of a server that is not AWS; empty for AWS."""
    return current().endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")


def _region(bucket: str) -> str:
    found = current().region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if found or endpoint():
        return found or "us-east-1"
    return _region_of(bucket)


@lru_cache(maxsize=64)
def _region_of(bucket: str) -> str:
    return str(pafs.resolve_s3_region(bucket))


def _variables() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def _options(config: StorageConfig, region: str) -> dict[str, Any]:
    scheme, _, host = endpoint().rpartition("://")
    return {
        "anonymous": config.anonymous,
        "region": region,
        "scheme": scheme or "https",
        "endpoint_override": host.rstrip("/") or None,
        "force_virtual_addressing": bool(host) and not config.path_style,
        "request_timeout": config.timeout,
        "connect_timeout": min(config.timeout, 10.0),
    }


@lru_cache(maxsize=8)
def _filesystem(config: StorageConfig, region: str, variables: tuple[tuple[str, str], ...]) -> pafs.S3FileSystem:
    strategy = pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS)
    return pafs.S3FileSystem(**_options(config, region), retry_strategy=strategy)


@lru_cache(maxsize=8)
def _client(config: StorageConfig, variables: tuple[tuple[str, str], ...]) -> Any:
    style = "auto" if not endpoint() else "path" if config.path_style else "virtual"
    settings = Config(
        signature_version=UNSIGNED if config.anonymous else None,
        s3={"addressing_style": style},  # type: ignore[arg-type]
        connect_timeout=min(config.timeout, 10.0),
        read_timeout=config.timeout,
        retries={"mode": "standard", "total_max_attempts": SDK_ATTEMPTS},
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.Session(profile_name=config.profile or None)
    return session.client(
        "s3",
        endpoint_url=endpoint() or None,
        region_name=config.region or os.environ.get("AWS_REGION"),
        config=settings,
    )
