"""The files of jobs in ``service.storage``, a local folder or ``s3://``, which all replicas share.

::

    service.json                    marks the folder as the service's
    inputs/<owner>/<id>.npy         given frames, until the job has ended
    videos/<owner>/<id>.<n>.<type>  the result of lease n

Identifiers and owner names are checked before they become part of a path. No other text of a client ever does.
"""

import io

import numpy as np

from ardiff.data import storage
from ardiff.errors import DataError
from ardiff.serving.records import JobRecord

_MARKER = "service.json"


class JobFiles:
    """Reads and writes the files. Methods raise DataError if storage is unavailable."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)

    def mark(self) -> None:
        """Marks the folder. An unmarked one is an error: an unmounted disk, for example, leaves an empty folder."""
        storage.write_bytes(self._path(_MARKER), b"{}")

    def write_input(self, record: JobRecord, given_frames: np.ndarray) -> None:
        """Writes given frames, uint8 ``(k, H, W, 3)``."""
        buffer = io.BytesIO()
        np.save(buffer, given_frames, allow_pickle=False)
        storage.write_bytes(self._input(record), buffer.getvalue())

    def read_input(self, record: JobRecord) -> np.ndarray:
        """The given frames, uint8 ``(k, H, W, 3)``. Raises EOFError if they are missing, ValueError if damaged."""
        file = self._find(self._input(record))
        return np.load(io.BytesIO(b"" if file is None else storage.read_bytes(file.uri)), allow_pickle=False)

    def write_video(self, record: JobRecord, video: bytes) -> None:
        """Writes the finished video."""
        storage.write_bytes(self._video(record, record.lease), video)

    def video(self, record: JobRecord) -> storage.RangeReader | None:
        """The finished video, of which ranges are read, or None if its file is missing."""
        return self._find(self._video(record, record.lease))

    def delete_video(self, record: JobRecord) -> None:
        """Deletes the video of the record's lease."""
        storage.delete_files([self._video(record, record.lease)])

    def delete(self, *records: JobRecord) -> None:
        """Deletes the files of jobs that have ended. Replicas that crashed may have written videos too."""
        names = [self._input(record) for record in records if record.sampling.given_frames]
        for record in records:
            first = 1 if record.crashes else record.lease
            names += [self._video(record, lease) for lease in range(max(first, 1), record.lease + 1)]
        storage.delete_files(names)

    def delete_input(self, record: JobRecord) -> None:
        """Deletes the given frames, which an ended job does not need."""
        storage.delete_files([self._input(record)])

    def _find(self, uri: str) -> storage.RangeReader | None:
        file = storage.find_file(uri)
        if not file.problem:
            return storage.RangeReader(file.uri, file.size)
        if not storage.exists(self._path(_MARKER)):
            raise DataError(f"{self.root} is not the folder that the service started with: {_MARKER} is missing.")
        return None

    def _path(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def _input(self, record: JobRecord) -> str:
        return self._path("inputs", record.owner, f"{record.id}.npy")

    def _video(self, record: JobRecord, lease: int) -> str:
        return self._path("videos", record.owner, f"{record.id}.{lease}.{record.suffix}")
