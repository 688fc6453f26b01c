"""Files on local disks, S3, Google Cloud Storage and Azure, through one set of functions.

A URI is a string: a local path, which may be relative, ``s3://bucket/key``, ``gs://bucket/key`` or
``az://container/name``. Names in a URI are literal, as in the AWS command line: a space or ``%`` in a key is not
escaped. Members of tars can be read, see :mod:`ardiff.data.members`. Every operation is retried after transient errors,
see :mod:`ardiff.data.retries`. Reading S3 needs the rights ``s3:GetObject`` and ``s3:ListBucket`` only.
"""

import contextlib
import functools
import io
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from ardiff.data import azure, gcs, s3
from ardiff.data.local_files import list_local
from ardiff.data.members import parse_member
from ardiff.data.retries import with_retries
from ardiff.errors import DataError, StorageError


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file or object of a listing."""

    uri: str
    size: int
    """Bytes."""
    etag: str
    """Changes when the content changes: the etag of S3, or the modification time of a local file."""
    problem: str = ""
    """Why it cannot be read, such as a link to nothing; empty if it can."""


def is_remote(uri: str) -> bool:
    """True for ``s3://`` and other URIs, False for local paths."""
    return "://" in uri


def absolute(uri: str) -> str:
    """The absolute path of a local path; other URIs are returned as they are."""
    return uri if is_remote(uri) else str(Path(uri).absolute())


def open_filesystem(uri: str, retry: bool = False) -> tuple[pafs.FileSystem, str]:
    """The PyArrow file system of ``uri``, and the path in it. Raises DataError for an invalid URI.

    ``retry`` is for code that does not retry on its own, see :func:`ardiff.data.s3.filesystem`.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    scheme, _, rest = uri.partition("://")
    authority, slash, name = rest.partition("/")
    try:
        if scheme == "s3":
            return s3.filesystem(authority, retry), f"{authority}{slash}{name}"
        if scheme == "gs":
            return gcs.filesystem(retry), f"{authority}{slash}{name}"
        if scheme == "az":
            return azure.filesystem(), f"{authority}{slash}{name}"
        filesystem, path = pafs.FileSystem.from_uri(f"{scheme}://{authority}{slash}{quote(name)}")
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"Cannot open {uri}: {error}") from error
    return filesystem, path


def join(uri: str, *parts: str) -> str:
    """``uri/part/...``. Raises DataError if ``uri`` is empty or a part leads out of it."""
    if not uri:
        raise DataError("The name of a folder is empty: give a path or an s3:// URI.")
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or "\\" in part or "\0" in part:
            raise DataError(f"'{part}' is not a name below {uri}.")
    return "/".join([uri.rstrip("/"), *parts]) if parts else uri


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises StorageError if it cannot be read."""
    if (member := parse_member(uri)) is not None:
        return read_range(uri, 0, member.size)

    def read() -> bytes:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            return s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        if not is_remote(uri):
            return Path(uri).read_bytes()
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return with_retries(f"Cannot read {uri}", read)


def read_range(uri: str, start: int, length: int) -> bytes:
    """``length`` bytes from ``start`` on, fewer at the end of the file. Raises StorageError."""
    if (member := parse_member(uri)) is not None:
        length = min(length, member.size - start)
        return read_range(member.tar, member.start + start, length) if length > 0 else b""

    def read() -> bytes:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            part = f"bytes={start}-{start + length - 1}"
            return s3.client().get_object(Bucket=bucket, Key=key, Range=part)["Body"].read()
        filesystem, path = open_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            return bytes(file.read_at(length, start))

    return with_retries(f"Cannot read {uri}", read)


class RangeReader(io.RawIOBase):
    """A file of known size that is read by ranges with :func:`read_range`."""

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
    """Writes the file atomically, and creates local folders. Raises StorageError if it cannot be written."""

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

    with_retries(f"Cannot write {uri}", write)


def exists(uri: str) -> bool:
    """Whether ``uri`` is a file or a folder that is not empty."""
    if _has_empty_part(uri):
        return _listed_size(uri) is not None or _first_object(f"{uri.rstrip('/')}/") is not None
    return bool(_file_info(uri).type != pafs.FileType.NotFound)


def size(uri: str) -> int:
    """Bytes of the file. Raises DataError if there is none."""
    if _has_empty_part(uri):
        found = _listed_size(uri)
    else:
        found = _file_info(uri).size  # None for a folder, and if there is none
    if found is None:
        raise DataError(f"There is no file {uri}: check the path.")
    return int(found)


def _file_info(uri: str) -> pafs.FileInfo:
    filesystem, path = open_filesystem(uri)
    return with_retries(f"Cannot look at {uri}", lambda: filesystem.get_file_info(path))


def _has_empty_part(uri: str) -> bool:
    """Whether it is a key such as ``a//b``, which S3 allows and PyArrow's file system rejects."""
    return _is_s3(uri) and "//" in uri.removeprefix("s3://")


def _listed_size(uri: str) -> int | None:
    """Bytes of an object, by listing: it is the first of those whose keys begin with its own."""
    entry = _first_object(uri)
    return entry[1] if entry is not None and entry[0] == _bucket_and_key(uri)[1] else None


def _first_object(prefix: str) -> tuple[str, int, str] | None:
    return with_retries(f"Cannot list {prefix}", lambda: next(s3.objects(*_bucket_and_key(prefix)), None))


def list_objects(uri: str, suffixes: tuple[str, ...] = (), unreadable: bool = False) -> list[StoredFile]:
    """All files below ``uri``, sorted by name; their URIs begin with ``uri``.

    Args:
        uri: A folder or prefix.
        suffixes: Suffixes to keep, lower case, with the dot; none keeps all. Hidden files are skipped.
        unreadable: Whether to list also local entries that cannot be read, see :mod:`ardiff.data.local_files`.

    Raises:
        DataError: The folder does not exist or cannot be listed.
    """
    root = uri.rstrip("/")

    def entries() -> list[tuple[str, int, str, str]] | None:
        if _is_s3(uri):
            bucket, prefix = _bucket_and_key(f"{root}/")
            objects = [(key[len(prefix) :], size, etag, "") for key, size, etag in s3.objects(bucket, prefix)]
            if not objects and prefix:
                return None
            return [entry for entry in objects if entry[0] and not entry[0].endswith("/")]
        filesystem, path = open_filesystem(uri)
        try:
            if isinstance(filesystem, pafs.LocalFileSystem):
                return [(*file,) for file in list_local(path)]
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        except FileNotFoundError:
            return None
        if not infos:  # a bucket has no empty folders
            return None
        skip = len(path.rstrip("/")) + 1
        files = [info for info in infos if info.type == pafs.FileType.File]
        return [(info.path[skip:], info.size, f"{info.mtime_ns:x}", "") for info in files]

    listed = with_retries(f"Cannot list {uri}", entries)
    if listed is None:
        raise DataError(f"There is no folder {uri}: check the path.")
    matching = [f for f in listed if (not suffixes or f[0].lower().endswith(suffixes)) and (unreadable or not f[3])]
    visible = [f for f in matching if not any(part.startswith(".") for part in f[0].split("/"))]
    return [StoredFile(f"{root}/{name}", size, etag, problem) for name, size, etag, problem in sorted(visible)]


def find_file(uri: str) -> StoredFile:
    """The file at ``uri``, with a ``problem`` if there is none. Raises StorageError if storage is unavailable."""
    if (member := parse_member(uri)) is not None:
        tar = find_file(member.tar)
        problem = tar.problem or "the tar ends before it" * (member.start + member.size > tar.size)
        return StoredFile(uri, member.size, tar.etag, problem)

    def look() -> StoredFile:
        if _is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            head = s3.client().head_object(Bucket=bucket, Key=key)
            return StoredFile(uri, head["ContentLength"], head["ETag"].strip('"'))
        filesystem, path = open_filesystem(uri)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File:
            return StoredFile(uri, 0, "", "there is no such file")
        return StoredFile(uri, info.size, f"{info.mtime_ns or 0:x}")

    try:
        return with_retries(f"Cannot look at {uri}", look)
    except DataError as error:
        if isinstance(error, StorageError) and error.transient:
            raise
        return StoredFile(uri, 0, "", str(error))


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The URIs of :func:`list_objects`."""
    return [file.uri for file in list_objects(uri, suffixes)]


def upload_folder(local: Path, uri: str) -> None:
    """Copies every file below ``local`` to the same name below ``uri``. Large files are streamed.

    Raises:
        DataError: ``local`` does not exist, or ``uri`` cannot be written.
    """
    if not local.is_dir():
        raise DataError(f"There is no folder {local} to copy to {uri}.")
    for file in sorted(p for p in local.rglob("*") if p.is_file()):
        name = file.relative_to(local).as_posix()
        with_retries(f"Cannot write {uri}", functools.partial(_upload, file, f"{uri.rstrip('/')}/{name}"))


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
        DataError: There is no file below ``uri``, or one cannot be copied or has a name that leads out of ``local``.
    """
    files = list_files(uri)
    if not files:
        raise DataError(f"There is nothing in {uri}: check the path.")
    for file in files:
        download_file(file, Path(join(str(local), file[len(uri.rstrip("/")) + 1 :])))


def download_file(uri: str, local: Path) -> None:
    """Copies the file to ``local``, and creates its folders. Raises DataError if it cannot be copied."""
    with_retries(f"Cannot copy {uri} to {local}", functools.partial(_download, uri, local))


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
    """Deletes a file if it exists. Raises StorageError if it cannot be deleted."""
    if _is_s3(uri):
        bucket, key = _bucket_and_key(uri)
        with_retries(f"Cannot delete {uri}", lambda: s3.client().delete_object(Bucket=bucket, Key=key))
        return
    filesystem, path = open_filesystem(uri)

    def delete() -> None:
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                filesystem.delete_file(path)

    with_retries(f"Cannot delete {uri}", delete)


def delete_files(uris: Sequence[str]) -> None:
    """Deletes files as far as they exist, several at the same time. Raises StorageError if one cannot be deleted."""
    with ThreadPoolExecutor(min(16, len(uris) or 1)) as threads:
        list(threads.map(delete_file, uris))


def delete_folder(uri: str) -> None:
    """Deletes a folder and its content if it exists. Raises DataError if it cannot be deleted."""
    filesystem, path = open_filesystem(uri)

    def delete() -> None:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)

    with_retries(f"Cannot delete {uri}", delete)


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
