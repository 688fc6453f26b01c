"""Features of clips in Parquet files. Each row has the id of its clip, so no clip is counted twice.

Shapes: V clips, k rows of D features each.
"""

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.tables import to_parquet
from ardiff.errors import DataError
from ardiff.metrics.features import VideoFeatures

BLOCK = 64
"""Clips whose features are in memory at once."""
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("uri", pa.string()),
        ("start", pa.int64()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("features", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class ClipFeatures:
    """The features of one clip."""

    id: int
    """Index of the clip in its set."""
    uri: str
    start: int
    """First frame."""
    sha256: str
    """Of the clip's pixels; for a pair those of the original and of the other video, separated by a colon."""
    features: np.ndarray
    """float32 ``(k, D)``."""


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip in a store, see :class:`ClipFeatures`."""

    id: int
    uri: str
    start: int
    sha256: str
    file: str
    """File of its features."""
    row: int
    """Row in that file."""


class FeatureStore:
    """A folder of Parquet files.

    Writing the same clips again replaces their file or adds rows with the same ids. Only the first row of an id counts.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def append(self, rows: Sequence[ClipFeatures]) -> None:
        """Writes all rows as one file, atomically.

        Raises:
            DataError: A feature is NaN or infinite, or the file cannot be written.
        """
        for row in rows:
            if not np.isfinite(row.features).all():
                raise DataError(
                    f"The features of {row.uri} contain NaN or infinity: look at the video, or check the weights."
                )
        ids = [r.id for r in rows]
        columns = {
            "id": ids,
            "uri": [r.uri for r in rows],
            "start": [r.start for r in rows],
            "sha256": [r.sha256 for r in rows],
            "width": [r.features.shape[-1] for r in rows],
            "features": [r.features.reshape(-1).astype(np.float32) for r in rows],
        }
        storage.write_bytes(
            f"{self.folder}/part-{min(ids):08d}-{max(ids):08d}.parquet", to_parquet(pa.table(columns, schema=SCHEMA))
        )

    def ids(self) -> set[int]:
        """Ids of the stored clips."""
        return {int(i) for file in self._files() for i in self._table(file, ["id"])["id"].to_numpy()}

    def clips(self, count: int) -> list[StoredClip]:
        """The clips 0 to ``count - 1``, without their features. Raises DataError if one is missing."""
        rows: dict[int, StoredClip] = {}
        for file in self._files():
            for number, row in enumerate(self._table(file, ["id", "uri", "start", "sha256"]).to_pylist()):
                rows.setdefault(row["id"], StoredClip(**row, file=file, row=number))
        missing = [i for i in range(count) if i not in rows]
        if missing:
            raise DataError(f"{self.folder} has no features of clip {missing[0]}: run the evaluation again.")
        return [rows[i] for i in range(count)]

    def read(self, count: int) -> tuple[VideoFeatures, list[StoredClip]]:
        """Features of the clips 0 to ``count - 1`` in the order of their ids, and the clips.

        Every iteration over the features reads blocks of float32 ``(v, k, D)`` from the files, one at a time. It raises
        DataError if they have different shapes.

        Raises:
            DataError: A clip is missing.
        """
        clips = self.clips(count)
        return VideoFeatures.of(functools.partial(self._blocks, clips), count), clips

    def _blocks(self, clips: Sequence[StoredClip]) -> Iterator[np.ndarray]:
        shapes = set()
        for first in range(0, len(clips), BLOCK):
            features: dict[int, np.ndarray] = {}
            block = clips[first : first + BLOCK]
            for file in sorted({clip.file for clip in block}):
                table = self._table(file, ["features", "width"])
                values, widths = table["features"].combine_chunks(), table["width"].to_pylist()
                for clip in block:
                    if clip.file == file:
                        features[clip.id] = values[clip.row].values.to_numpy().reshape(-1, widths[clip.row])
            shapes |= {array.shape for array in features.values()}
            if len(shapes) > 1:
                raise DataError(
                    f"{self.folder} contains features of different shapes: delete it and run the evaluation again."
                )
            yield np.stack([features[clip.id] for clip in block])

    def _files(self) -> list[str]:
        return storage.list_files(self.folder, (".parquet",)) if storage.exists(self.folder) else []

    def _table(self, file: str, columns: list[str]) -> pa.Table:
        try:
            return pq.read_table(io.BytesIO(storage.read_bytes(file)), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is damaged: delete {self.folder} and run again.") from error
