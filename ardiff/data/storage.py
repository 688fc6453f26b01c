"""Places: local paths and ``s3://`` URIs, through one set of functions on pyarrow's file systems.

A place is a string. Local paths may be relative. The names in a URI are literal, as in the AWS command line: a space or
``%`` in a key is written as it is, not escaped. S3 reads the usual AWS environment variables, ``AWS_ENDPOINT_URL``
included.
"""

import os
import shutil
import uuid
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from ardiff.errors import DataError


def is_remote(uri: str) -> bool:
    """True for ``s3://`` and other URIs, False for local paths."""
    return "://" in uri


def absolute(uri: str) -> str:
    """The place by a name that means the same in every process of this machine; URIs are that already."""
    return uri if is_remote(uri) else str(Path(uri).absolute())


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system that holds ``uri`` and the path there. Raises DataError for a URI that cannot be understood."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    # Some stores that are not AWS refuse or corrupt uploads with the newer default checksums.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    scheme, _, rest = uri.partition("://")
    authority, slash, name = rest.partition("/")
    try:
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
    """The whole file. Raises DataError if it cannot be read."""
    filesystem, path = open_filesystem(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except OSError as error:
        raise _failure(f"Cannot read {uri}", error) from error


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the whole file or nothing, making local folders as needed. Raises DataError if it cannot be written."""
    filesystem, path = open_filesystem(uri)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
            try:
                draft.write_bytes(data)
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
    except OSError as error:
        raise _failure(f"Cannot write {uri}", error) from error


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
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise _failure(f"Cannot look at {uri}", error) from error


def list_files(uri: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """All files below ``uri``, sorted, named in the style of ``uri``.

    Args:
        uri: A folder or prefix.
        suffixes: Endings to keep, lower case, with the dot; none keeps all. Hidden files are left out.

    Raises:
        DataError: There is no such folder, or it cannot be listed.
    """
    filesystem, path = open_filesystem(uri)
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    except FileNotFoundError as error:
        raise DataError(f"There is no folder {uri}: check the path.") from error
    except OSError as error:
        raise _failure(f"Cannot list {uri}", error) from error
    names = [info.path[len(path.rstrip("/")) + 1 :] for info in infos if info.type == pafs.FileType.File]
    kept = [n for n in names if not suffixes or n.lower().endswith(suffixes)]
    return [f"{uri.rstrip('/')}/{n}" for n in sorted(kept) if not any(p.startswith(".") for p in n.split("/"))]


def upload_folder(local: Path, uri: str) -> None:
    """Copies every file below ``local`` to the same name below ``uri``; large files are streamed.

    Raises:
        DataError: There is no folder ``local``, or ``uri`` cannot be written.
    """
    if not local.is_dir():
        raise DataError(f"There is no folder {local} to copy to {uri}.")
    filesystem, path = open_filesystem(uri)
    try:
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            target = f"{path}/{file.relative_to(local).as_posix()}"
            if isinstance(filesystem, pafs.LocalFileSystem):
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            else:
                pafs.copy_files(str(file), target, pafs.LocalFileSystem(), filesystem)
    except OSError as error:
        raise _failure(f"Cannot write {uri}", error) from error


def download_folder(uri: str, local: Path) -> None:
    """Copies every file below ``uri`` to the same name below ``local``.

    Raises:
        DataError: There is no file below ``uri``, one cannot be copied, or its name would lead out of ``local``.
    """
    files = list_files(uri)
    if not files:
        raise DataError(f"There is nothing in {uri}: check the path.")
    filesystem, _ = open_filesystem(uri)
    for file in files:
        target = Path(join(str(local), file[len(uri.rstrip("/")) + 1 :]))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(open_filesystem(file)[1], str(target), filesystem, pafs.LocalFileSystem())
        except OSError as error:
            raise _failure(f"Cannot copy {file} to {target}", error) from error


def delete_folder(uri: str) -> None:
    """Deletes a folder and all that is in it, if there is one. Raises DataError if it cannot be deleted."""
    filesystem, path = open_filesystem(uri)
    try:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)
    except OSError as error:
        raise _failure(f"Cannot delete {uri}", error) from error


def _failure(what: str, error: OSError) -> DataError:
    reason = (error.strerror or str(error)).rstrip(".")
    remedy = (
        "the bucket, the credentials and AWS_ENDPOINT_URL" if "AWS Error" in reason else "the path and its permissions"
    )
    return DataError(f"{what}: {reason}. Check {remedy}.")
