"""Tars for tests."""

import io
import tarfile


def tar_of(content: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with members of these names and contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
