"""Listing a local folder with all that disks hold: links that form loops, dangling links, pipes, undecodable names."""

import os
import stat
from pathlib import Path
from typing import NamedTuple


class LocalFile(NamedTuple):
    """An entry below a folder that is not a folder itself."""

    name: str
    """Its path below the folder. Bytes of the name that are not UTF-8 are written as ``\\\\xff``."""
    size: int
    """Bytes."""
    etag: str
    """The modification time."""
    problem: str
    """Why it cannot be read; empty if it can."""


def list_local(folder: str) -> list[LocalFile]:
    """All entries below ``folder`` but folders and hidden ones, in no order. Links are followed.

    A link to a folder that contains it is not followed.

    Raises:
        OSError: ``folder`` or one below it cannot be listed.
    """
    files: list[LocalFile] = []
    top = Path(folder).stat()
    pending = [(folder, "", frozenset({(top.st_dev, top.st_ino)}))]
    while pending:
        path, prefix, parents = pending.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = prefix + entry.name
                info, problem = _stat(entry)
                if info is not None and stat.S_ISDIR(info.st_mode):
                    identity = (info.st_dev, info.st_ino)
                    if identity not in parents:
                        pending.append((entry.path, f"{name}/", parents | {identity}))
                elif info is not None or problem:
                    files.append(_local_file(name, info, problem))
    return files


def _stat(entry: os.DirEntry[str]) -> tuple[os.stat_result | None, str]:
    """What the entry is, links followed, and why it cannot be read. Neither if it was deleted meanwhile."""
    try:
        info = entry.stat()
    except OSError as error:
        if entry.is_symlink():
            return None, f"it is a link to a file that cannot be reached ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            return None, ""
        raise
    readable = stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)
    return info, "" if readable else "it is a pipe, socket or device, not a file"


def _local_file(name: str, info: os.stat_result | None, problem: str) -> LocalFile:
    printable = os.fsencode(name).decode("utf-8", "backslashreplace")
    if printable != name:
        problem = "its name is not UTF-8: rename it"
    size, etag = (0, "") if info is None else (info.st_size, f"{info.st_mtime_ns:x}")
    return LocalFile(printable, size, etag, problem)
