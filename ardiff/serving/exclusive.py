"""Storage operations that replicas need to share a folder: creating a file exclusively, and times of the last write."""

import os
import uuid
from pathlib import Path

import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from ardiff.data import s3
from ardiff.data.storage import open_filesystem
from ardiff.errors import DataError


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes a file if it does not exist. Of several callers at the same time, one gets True.

    On S3 this is ``If-None-Match: *``, which is atomic on AWS. OpenStack Swift checks first and then writes.

    Raises:
        DataError: It cannot be written.
    """
    filesystem, path = open_filesystem(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return _create_object(uri, path, data)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            os.link(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise DataError(f"Cannot write {uri}: {error.strerror}. Check the path and its permissions.") from error
    return True


def _create_object(uri: str, path: str, data: bytes) -> bool:
    bucket, _, key = path.partition("/")
    try:
        s3.client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
            return False
        raise DataError(f"Cannot write {uri}: {error}. Check the bucket and the credentials.") from error
    except BotoCoreError as error:
        raise DataError(f"Cannot write {uri}: {error}. Check AWS_ENDPOINT_URL and the network.") from error
    return True


def changed_at(uri: str) -> dict[str, int]:
    """Names of all files below ``uri``, and when each was last written, in ns by the store's clock.

    A missing folder holds no files. Raises DataError if it cannot be listed.
    """
    filesystem, path = open_filesystem(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    for retry in (True, True, False):
        try:
            infos = filesystem.get_file_info(selector)
            break
        except OSError as error:
            # A folder may be created, or a file deleted, while it is listed.
            if not (retry and isinstance(error, FileNotFoundError)):
                raise DataError(f"Cannot list {uri}: {error}.") from error
    start = len(path.rstrip("/")) + 1
    files = {info.path[start:]: int(info.mtime_ns or 0) for info in infos if info.type == pafs.FileType.File}
    return {name: changed for name, changed in files.items() if not Path(name).name.startswith(".")}
