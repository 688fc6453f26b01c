"""S3 clients, built from a :class:`StorageConfig`.

The configuration is passed in environment variables, so every process of a job builds the same clients. It holds no
secrets: credentials come from the AWS variables, profiles and instance roles of each node.
"""

import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import boto3
import pyarrow.fs as pafs
from botocore import UNSIGNED
from botocore.config import Config

from ardiff.data.config import STORAGE_VARIABLE, StorageConfig

SDK_ATTEMPTS = 3
"""Attempts that the AWS libraries make on their own, within about a second."""
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
"""Some S3 servers other than AWS refuse or corrupt uploads with the newer default checksums of PyArrow."""


def configure(config: StorageConfig) -> None:
    """Applies ``config`` to this process and the processes it starts."""
    os.environ.update(config.environment())


def current() -> StorageConfig:
    """The settings of this process."""
    return StorageConfig(**json.loads(os.environ.get(STORAGE_VARIABLE, "{}")))


def filesystem(bucket: str, retry: bool = False) -> pafs.S3FileSystem:
    """PyArrow's file system of S3, for Parquet and copies. ``bucket`` determines the region on AWS.

    ``retry`` is for code that does not retry on its own: the file system retries requests for about
    ``storage.retry_seconds``, also after it has been pickled.
    """
    os.environ.setdefault(*CHECKSUMS)
    if not retry:
        return _filesystem(current(), region(bucket), _variables())
    return RetryingS3FileSystem(bucket, _options(current(), region(bucket)))


class RetryingS3FileSystem(pafs.S3FileSystem):
    """An S3 file system that keeps its retry strategy when it is pickled; PyArrow's does not (26.0)."""

    def __new__(cls, bucket: str, options: dict[str, Any]) -> "RetryingS3FileSystem":
        return super().__new__(cls)

    def __init__(self, bucket: str, options: dict[str, Any]) -> None:
        # Pauses double up to 20 seconds: 8 attempts took 53 seconds in a measurement.
        attempts = 5 + math.ceil(current().retry_seconds / 15)
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts))
        self.bucket = bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return filesystem, (self.bucket, True)


def client() -> Any:
    """The boto3 client, for all other requests."""
    return _client(current(), _variables())


def objects(bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Key, size and etag of every object whose key begins with ``prefix``, in S3's order. Needs ``s3:ListBucket``."""
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            yield entry["Key"], entry["Size"], entry["ETag"].strip('"')


def endpoint() -> str:
    """The URL of a server other than AWS; empty for AWS."""
    return current().endpoint or os.environ.get("AWS_ENDPOINT_URL_S3", "") or os.environ.get("AWS_ENDPOINT_URL", "")


def region(bucket: str) -> str:
    """The region of a bucket: configured, of the environment, or asked of AWS."""
    configured = current().region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if configured or endpoint():
        return configured or "us-east-1"
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
