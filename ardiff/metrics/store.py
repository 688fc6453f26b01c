"""Features of clips as Parquet: one id a row, in parts that are written whole, so nothing is ever counted twice.

Shapes: V clips, k rows of D features each.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.errors import DataError

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
        return {int(i) for table in self._tables(["id"]) for i in table["id"].to_numpy()}

    def read(self, count: int) -> tuple[np.ndarray, list[ClipFeatures]]:
        """Features of the clips 0 to ``count - 1`` in the order of their ids, float32 ``(V, k, D)``, and their rows.

        Raises:
            DataError: A clip is missing, or their features have different shapes.
        """
        rows: dict[int, ClipFeatures] = {}
        for table in self._tables(None):
            for row in table.to_pylist():
                features = np.asarray(row["features"], dtype=np.float32).reshape(-1, row["width"])
                clip = ClipFeatures(row["id"], row["uri"], row["start"], row["sha256"], features)
                rows.setdefault(clip.id, clip)
        missing = [i for i in range(count) if i not in rows]
        if missing:
            raise DataError(f"{self.folder} lacks the features of clip {missing[0]}: run the evaluation again.")
        clips = [rows[i] for i in range(count)]
        if len({clip.features.shape for clip in clips}) > 1:
            raise DataError(
                f"{self.folder} holds features of different shapes: delete it and run the evaluation again."
            )
        return np.stack([clip.features for clip in clips]), clips

    def _tables(self, columns: list[str] | None) -> list[pa.Table]:
        if not storage.exists(self.folder):
            return []
        files = storage.list_files(self.folder, (".parquet",))
        try:
            return [pq.read_table(io.BytesIO(storage.read_bytes(f)), columns=columns) for f in files]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"A part of {self.folder} is damaged: delete the folder and run again.") from error
