"""Retrying storage operations after transient errors."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from random import Random
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as AWSConnectionError

from ardiff.data import azure, s3
from ardiff.errors import StorageError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
_TRANSIENT_CODES = re.compile(
    "SlowDown|Throttl|RequestLimitExceeded|RequestTimeout|InternalError|ServiceUnavailable|OperationAborted|BadDigest"
)
_TRANSIENT_TEXT = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|INTERNAL_FAILURE|SERVICE_UNAVAILABLE)"
    r"|HTTP status (429|5\d\d)"
    # Without credentials, Google's library says UNAVAILABLE as well.
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)(?!.*OAuth2)"
    # Azure's library gives no code if no answer came.
    r"|Azure Error: (\[\] Fail to get a new connection|\[\w*\] (429|5\d\d))"
)
_GOOGLE, _AZURE = "google::cloud", "Azure Error"
_TRANSIENT_ERRNO = {errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN, errno.ESTALE}


def with_retries(description: str, operation: Callable[[], ResultT]) -> ResultT:
    """The result of ``operation``, retried with growing pauses for ``storage.retry_seconds`` after transient errors.

    Raises:
        StorageError: The operation failed; the message begins with ``description`` and states the number of attempts.
    """
    deadline, attempt = time.monotonic() + s3.current().retry_seconds, 1
    while True:
        try:
            return operation()
        except (OSError, BotoCoreError, ClientError) as error:
            transient = is_transient(error)
            # Pauses are random so that many processes that failed together do not retry together.
            jitter = Random(f"{description} {os.getpid()} {attempt}").uniform(0.5, 1)
            pause = min(0.25 * 2**attempt, 15.0) * jitter
            if not transient or time.monotonic() + pause > deadline:
                raise storage_error(description, error, attempt) from error
            logger.warning("%s: %s. Retrying in %.1f s.", description, _reason(error), pause)
            time.sleep(pause)
            attempt += 1


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    match error:
        case ClientError():
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(error.response.get("Error", {}).get("Code", ""))
            return status in (429, 500, 502, 503, 504) or bool(_TRANSIENT_CODES.search(code))
        case BotoCoreError():
            return isinstance(
                error, AWSConnectionError | HTTPClientError | IncompleteReadError | ResponseStreamingError
            )
        case OSError():
            return error.errno in _TRANSIENT_ERRNO or bool(_TRANSIENT_TEXT.search(str(error)))
    return False


def is_bucket_error(error: Exception) -> bool:
    """Whether a client of S3, Google Cloud Storage or Azure reports the error, and not the content of a file."""
    texts = ("AWS Error", _GOOGLE, _AZURE)
    return isinstance(error, BotoCoreError | ClientError) or any(text in str(error) for text in texts)


def storage_error(description: str, error: Exception, attempts: int = 1) -> StorageError:
    """The error of an operation that failed; its message begins with ``description`` and ends with what to check."""
    remedy = "the path and its permissions"
    if _GOOGLE in str(error):
        remedy = "the bucket and GOOGLE_APPLICATION_CREDENTIALS, or set storage.anonymous for a public bucket"
    elif _AZURE in str(error):
        remedy = f"the container, {azure.ACCOUNT}, and {azure.KEY} or {azure.SAS_TOKEN}"
    elif is_bucket_error(error):
        remedy = "the bucket, the credentials and AWS_ENDPOINT_URL"
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    failure = StorageError(f"{description}: {_reason(error)}{tried}. Check {remedy}.")
    failure.attempts, failure.transient = attempts, is_transient(error)
    return failure


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    # Google's and Azure's libraries add more than a user can read.
    return text.partition(" error_info=")[0].partition("\n")[0].strip().rstrip(".")
