"""Places: local paths and ``s3://`` URIs, through one set of functions.

A place is a string. Local paths may be relative. The names in a URI are literal, as in the AWS command line: a space or
``%`` in a key is written as it is, not escaped. How S3 is reached, and for how long requests that fail for passing
reasons are tried again, is said in :mod:`ardiff.data.s3`. Reading needs the rights to get and to list, nothing else.
"""

import contextlib
import functools
import io
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
from botocore.exceptions import BotoCoreError, ClientError

from ardiff.data import s3
from ardiff.errors import DataError, StorageError

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file or object, as a listing shows it."""

    uri: str
    size: int
    """Bytes."""
    etag: str
    """Changes when the content does: S3's etag, or the time of the last change of a local file."""


def is_remote(uri: str) -> bool:
    """True for ``s3://`` and other URIs, False for local paths."""
    return "://" in uri


def absolute(uri: str) -> str:
    """The place by a name that means the same in every process of this machine; URIs are that already."""
    return uri if is_remote(uri) else str(Path(uri).absolute())


def open_filesystem(uri: str, patient: bool = False) -> tuple[pafs.FileSystem, str]:
    """The file system that holds ``uri`` and the path there. Raises DataError for a URI that cannot be understood.

    ``patient`` is for code that tries nothing twice, see :func:`ardiff.data.s3.filesystem`.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    scheme, _, rest = uri.partition("://")
    authority, slash, name = rest.partition("/")
    try:
        if scheme == "s3":
            return s3.filesystem(authority, patient), f"{authority}{slash}{name}"
        filesystem, path = pafs.FileSystem.from_uri(f"{scheme}://{authority}{slash}{quote(name)}")
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"Cannot open {uri}: {error}") from error
    return filesystem, path


def join(uri: str, *parts: str) -> str:
    """``uri/part/...``. Raises DataError if ``uri`` is empty or a part would lead out of it."""
    if not uri:
        raise DataError("The name of a folder is empty: give a path or an s3:// URI.")
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "\\" in part or "\0" in part:
            raise DataError(f"'{part}' is not a name below {uri}.")
    return "/".join([uri.rstrip("/"), *parts]) if parts else uri


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises StorageError if it cannot be read."""

    def read() -> bytes:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            return s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        if not is_remote(uri):
            return Path(uri).read_bytes()
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return _trying(f"Cannot read {uri}", read)


def read_range(uri: str, start: int, length: int) -> bytes:
    """``length`` bytes from ``start`` on, fewer at the end of the file. Raises StorageError if they cannot be read."""

    def read() -> bytes:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            part = f"bytes={start}-{start + length - 1}"
            return s3.client().get_object(Bucket=bucket, Key=key, Range=part)["Body"].read()
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(length, start))

    return _trying(f"Cannot read {uri}", read)


class RangeReader(io.RawIOBase):
    """A file of known size that is read by ranges, each tried again on its own as :func:`read_bytes` is."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size, self.position = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(start + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self.size - self.position)
        if length <= 0:
            return 0
        data = read_range(self.uri, self.position, length)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the whole file or nothing, making local folders as needed. Raises StorageError if it cannot be written."""

    def write() -> None:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            s3.client().upload_fileobj(io.BytesIO(data), bucket, key)
            return
        filesystem, path = open_filesystem(uri)
        if not isinstance(filesystem, pafs.LocalFileSystem):
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            draft.write_bytes(data)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    _trying(f"Cannot write {uri}", write)


def exists(uri: str) -> bool:
    """True if ``uri`` is a file, or a folder with something in it."""
    return bool(_look(uri).type != pafs.FileType.NotFound)


def size(uri: str) -> int:
    """Bytes of the file. Raises DataError if there is none."""
    info = _look(uri)
    if info.type != pafs.FileType.File:
        raise DataError(f"There is no file {uri}: check the path.")
    return int(info.size)


def _look(uri: str) -> pafs.FileInfo:
    filesystem, path = open_filesystem(uri)
    return _trying(f"Cannot look at {uri}", lambda: filesystem.get_file_info(path))


def list_objects(uri: str, suffixes: tuple[str, ...] = ()) -> list[StoredFile]:
    """All files below ``uri``, sorted by name, named in the style of ``uri``.

    Args:
        uri: A folder or prefix.
        suffixes: Endings to keep, lower case, with the dot; none keeps all. Hidden files are left out.

    Raises:
        DataError: There is no such folder, or it cannot be listed.
    """
    root = uri.rstrip("/")

    def look() -> list[tuple[str, int, str]] | None:
        if _is_s3(uri):
            bucket, prefix = _bucket_and_key(f"{root}/")
            found = [(key[len(prefix) :], size, etag) for key, size, etag in s3.objects(bucket, prefix)]
            if not found and prefix:
                return None
            return [entry for entry in found if entry[0] and not entry[0].endswith("/")]
        filesystem, path = open_filesystem(uri)
        try:
            infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        except FileNotFoundError:
            return None
        skip = len(path.rstrip("/")) + 1
        files = [info for info in infos if info.type == pafs.FileType.File]
        return [(info.path[skip:], info.size, f"{info.mtime_ns:x}") for info in files]

    found = _trying(f"Cannot list {uri}", look)
    if found is None:
        raise DataError(f"There is no folder {uri}: check the path.")
    kept = [f for f in found if not suffixes or f[0].lower().endswith(suffixes)]
    visible = [f for f in kept if not any(part.startswith(".") for part in f[0].split("/"))]
    return [StoredFile(f"{root}/{name}", size, etag) for name, size, etag in sorted(visible)]


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The names of :func:`list_objects`."""
    return [file.uri for file in list_objects(uri, suffixes)]


def upload_folder(local: Path, uri: str) -> None:
    """Copies every file below ``local`` to the same name below ``uri``; large files are streamed.

    Raises:
        DataError: There is no folder ``local``, or ``uri`` cannot be written.
    """
    if not local.is_dir():
        raise DataError(f"There is no folder {local} to copy to {uri}.")
    for file in sorted(p for p in local.rglob("*") if p.is_file()):
        name = file.relative_to(local).as_posix()
        _trying(f"Cannot write {uri}", functools.partial(_upload, file, f"{uri.rstrip('/')}/{name}"))


def _upload(file: Path, uri: str) -> None:
    if _is_s3(uri):
        with file.open("rb") as data:
            s3.client().upload_fileobj(data, *_bucket_and_key(uri))
        return
    filesystem, target = open_filesystem(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    else:
        pafs.copy_files(str(file), target, pafs.LocalFileSystem(), filesystem)


def download_folder(uri: str, local: Path) -> None:
    """Copies every file below ``uri`` to the same name below ``local``.

    Raises:
        DataError: There is no file below ``uri``, one cannot be copied, or its name would lead out of ``local``.
    """
    files = list_files(uri)
    if not files:
        raise DataError(f"There is nothing in {uri}: check the path.")
    for file in files:
        target = Path(join(str(local), file[len(uri.rstrip("/")) + 1 :]))
        _trying(f"Cannot copy {file} to {target}", functools.partial(_download, file, target))


def _download(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if _is_s3(uri):
        bucket, key = _bucket_and_key(uri)
        with target.open("wb") as copy:
            shutil.copyfileobj(s3.client().get_object(Bucket=bucket, Key=key)["Body"], copy)
    else:
        filesystem, path = open_filesystem(uri)
        pafs.copy_files(path, str(target), filesystem, pafs.LocalFileSystem())


def delete_file(uri: str) -> None:
    """Deletes a file, if there is one. Raises StorageError if it cannot be deleted."""
    filesystem, path = open_filesystem(uri)

    def delete() -> None:
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                filesystem.delete_file(path)

    _trying(f"Cannot delete {uri}", delete)


def delete_folder(uri: str) -> None:
    """Deletes a folder and all that is in it, if there is one. Raises DataError if it cannot be deleted."""
    filesystem, path = open_filesystem(uri)

    def delete() -> None:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)

    _trying(f"Cannot delete {uri}", delete)


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _trying(what: str, operation: Callable[[], ResultT]) -> ResultT:
    """The operation's result; tried again with growing pauses as long as it fails for reasons that pass.

    Raises:
        StorageError: It failed for good; says how often it was tried.
    """
    deadline, attempt = time.monotonic() + s3.current().retry_seconds, 1
    while True:
        try:
            return operation()
        except (OSError, BotoCoreError, ClientError) as error:
            transient = s3.is_transient(error)
            # Spread, so that many processes that were refused together do not come back together.
            pause = min(0.25 * 2**attempt, 15.0) * Random(f"{what} {os.getpid()} {attempt}").uniform(0.5, 1)
            if not transient or time.monotonic() + pause > deadline:
                raise _failure(what, error, attempt, transient) from error
            logger.warning("%s: %s. Trying again in %.1f s.", what, _reason(error), pause)
            time.sleep(pause)
            attempt += 1


def _failure(what: str, error: Exception, attempts: int, transient: bool) -> StorageError:
    reason = _reason(error)
    remote = "AWS Error" in reason or isinstance(error, BotoCoreError | ClientError)
    remedy = "the bucket, the credentials and AWS_ENDPOINT_URL" if remote else "the path and its permissions"
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    failure = StorageError(f"{what}: {reason}{tried}. Check {remedy}.")
    failure.attempts, failure.transient = attempts, transient
    return failure


def _reason(error: Exception) -> str:
    return ((error.strerror if isinstance(error, OSError) else None) or str(error)).rstrip(".")
