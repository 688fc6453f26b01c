"""Features of clips as Parquet: one id a row, in parts that are written whole, so nothing is ever counted twice.

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
from ardiff.errors import DataError
from ardiff.metrics.uncertainty import Videos

BLOCK = 64
"""Clips whose features are read at once."""
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
    """What was extracted from one clip."""

    id: int
    """Place of the clip in its set."""
    uri: str
    start: int
    """First frame."""
    sha256: str
    """Of the clip's pixels; of a pair, the original's and the other's with a colon between."""
    features: np.ndarray
    """float32 ``(k, D)``."""


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip whose features are stored, see :class:`ClipFeatures`."""

    id: int
    uri: str
    start: int
    sha256: str
    part: str
    """File that holds its features."""
    row: int
    """Place in that file."""


class FeatureStore:
    """A folder of parts. Writing the same clips again replaces their part or adds rows of ids that are there already;
    of each id the first is read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def append(self, rows: Sequence[ClipFeatures]) -> None:
        """Writes rows as one part, or none of them.

        Raises:
            DataError: A feature is NaN or infinite, or the place cannot be written.
        """
        for row in rows:
            if not np.isfinite(row.features).all():
                raise DataError(
                    f"The features of {row.uri} hold NaN or infinity: look at the video, or check the weights."
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
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA), buffer)
        storage.write_bytes(f"{self.folder}/part-{min(ids):08d}-{max(ids):08d}.parquet", buffer.getvalue())

    def ids(self) -> set[int]:
        """Ids of the clips that are there."""
        return {int(i) for part in self._parts() for i in self._table(part, ["id"])["id"].to_numpy()}

    def clips(self, count: int) -> list[StoredClip]:
        """The clips 0 to ``count - 1``, without their features. Raises DataError if one is missing."""
        rows: dict[int, StoredClip] = {}
        for part in self._parts():
            for number, row in enumerate(self._table(part, ["id", "uri", "start", "sha256"]).to_pylist()):
                rows.setdefault(row["id"], StoredClip(**row, part=part, row=number))
        missing = [i for i in range(count) if i not in rows]
        if missing:
            raise DataError(f"{self.folder} lacks the features of clip {missing[0]}: run the evaluation again.")
        return [rows[i] for i in range(count)]

    def read(self, count: int) -> tuple[Videos, list[StoredClip]]:
        """Features of the clips 0 to ``count - 1`` in the order of their ids, and the clips.

        The features, blocks of float32 ``(v, k, D)``, are read anew whenever they are gone through: a block is in
        memory at a time. That raises DataError if they have different shapes.

        Raises:
            DataError: A clip is missing.
        """
        clips = self.clips(count)
        return Videos.of(functools.partial(self._blocks, clips), count), clips

    def _blocks(self, clips: Sequence[StoredClip]) -> Iterator[np.ndarray]:
        shapes = set()
        for first in range(0, len(clips), BLOCK):
            features: dict[int, np.ndarray] = {}
            block = clips[first : first + BLOCK]
            for part in sorted({clip.part for clip in block}):
                table = self._table(part, ["features", "width"])
                values, widths = table["features"].combine_chunks(), table["width"].to_pylist()
                for clip in block:
                    if clip.part == part:
                        features[clip.id] = values[clip.row].values.to_numpy().reshape(-1, widths[clip.row])
            shapes |= {array.shape for array in features.values()}
            if len(shapes) > 1:
                raise DataError(
                    f"{self.folder} holds features of different shapes: delete it and run the evaluation again."
                )
            yield np.stack([features[clip.id] for clip in block])

    def _parts(self) -> list[str]:
        return storage.list_files(self.folder, (".parquet",)) if storage.exists(self.folder) else []

    def _table(self, part: str, columns: list[str]) -> pa.Table:
        try:
            return pq.read_table(io.BytesIO(storage.read_bytes(part)), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"A part of {self.folder} is damaged: delete the folder and run again.") from error
