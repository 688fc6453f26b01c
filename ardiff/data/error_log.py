"""The error log: one row per bad sample, and the share of bad samples at which a job stops."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.manifest import Split, VideoRecord
from ardiff.data.tables import to_parquet
from ardiff.errors import ClipTooShortError, DataError, DecodeError, StorageError

ERRORS = "errors.parquet"
SCHEMA = pa.schema(
    {"uri": pa.string(), "clip": pa.int64(), "error": pa.string(), "message": pa.string(), "attempts": pa.int64()}
)
Unit = Literal["video", "clip"]


@dataclass(frozen=True, slots=True)
class BadSample:
    """A video or a clip that cannot be used, and the reason."""

    uri: str
    clip: int
    """First frame of the clip; -1 for the whole video."""
    error: str
    """The kind of error, such as ``corrupt``."""
    message: str
    attempts: int
    """Number of times it was read."""


def bad_sample(uri: str, clip: int, error: DataError) -> BadSample:
    """The row for an error. Raises ``error`` again if storage is unavailable, which is not the sample's fault."""
    match error:
        case StorageError():
            if error.transient:
                raise error
            return BadSample(uri, clip, "unreadable", str(error), error.attempts)
        case DecodeError():
            return BadSample(uri, clip, error.kind, str(error), 1)
    return BadSample(uri, clip, "unusable", str(error), 1)


def crashed_sample(uri: str, clip: int, crashes: int) -> BadSample:
    """The row for a sample that crashed every process that read it."""
    message = "the process that decodes it crashes, by a fault or for lack of memory"
    return BadSample(uri, clip, "crashed", message, crashes)


class ErrorLog:
    """Bad samples, each recorded once, with a limit on their share.

    Args:
        total: Videos or clips in all.
        max_bad_fraction: Share of them that may be bad.
        unit: What the limit counts: videos with any bad sample, or clips.
        rows: Bad samples of an earlier run.
        excluded: Samples that are left out on purpose. They are written to the file but do not count.
    """

    def __init__(
        self,
        total: int,
        max_bad_fraction: float,
        unit: Unit,
        rows: Iterable[BadSample] = (),
        excluded: Iterable[BadSample] = (),
    ) -> None:
        self.total, self.max_bad_fraction, self.unit = total, max_bad_fraction, unit
        self.rows = {(row.uri, row.clip): row for row in rows}
        self.excluded = list(excluded)

    def add(self, sample: BadSample) -> bool:
        """Records a bad sample. Returns whether it is new."""
        new = (sample.uri, sample.clip) not in self.rows
        self.rows[sample.uri, sample.clip] = sample
        return new

    @property
    def all_rows(self) -> list[BadSample]:
        """The rows of ``errors.parquet``."""
        return [*self.rows.values(), *self.excluded]

    @property
    def count(self) -> int:
        """Number of bad videos or clips."""
        return len({row.uri for row in self.rows.values()}) if self.unit == "video" else len(self.rows)

    def check(self) -> None:
        """Raises DataError if too many samples are bad; the message names the most frequent errors."""
        if self.count > self.max_bad_fraction * self.total:
            raise DataError(
                f"{self.count} of {self.total} {self.unit}s are bad ({self.count / max(self.total, 1):.1%}), more than "
                f"max_bad_fraction={self.max_bad_fraction:g} allows: {self.summary()}."
            )

    def summary(self, most: int = 3) -> str:
        """The most frequent kinds of error, each with its count and an example."""
        kinds = Counter(row.error for row in self.rows.values()).most_common(most)
        examples = {row.error: row for row in reversed(self.rows.values())}
        return "; ".join(f"{n} {kind} ({_example(examples[kind])})" for kind, n in kinds)


def too_short(records: Iterable[VideoRecord], split: Split, min_frames: int, fps: float = 0.0) -> list[BadSample]:
    """A row for every video that :func:`ardiff.data.manifest.usable` drops because of its length."""
    lengths = ((r.uri, r.length_at(fps)) for r in records if r.status == "ok" and r.split == split)
    need = f"frames{f' at {fps:g} frames/s' if fps else ''}, a clip needs {min_frames}"
    kind = ClipTooShortError.kind
    return [BadSample(uri, -1, kind, f"it has {length} {need}", 1) for uri, length in lengths if length < min_frames]


def _example(row: BadSample) -> str:
    message = row.message.rstrip(".")
    return message if row.uri in message else f"{row.uri}: {message}"


def write_errors(uri: str, rows: Iterable[BadSample]) -> None:
    """Writes the rows, sorted, as one Parquet file. A file without rows means that no sample was bad."""
    ordered = sorted(rows, key=lambda row: (row.uri, row.clip))
    storage.write_bytes(uri, to_parquet(pa.Table.from_pylist([asdict(row) for row in ordered], schema=SCHEMA)))


def read_errors(uri: str) -> list[BadSample]:
    """The rows of an error log; none if the file does not exist. Raises DataError if it is damaged."""
    if not storage.exists(uri):
        return []
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=SCHEMA)
    except pa.ArrowException as error:
        raise DataError(f"{uri} is not an error log ({error}): delete it.") from error
    return [BadSample(**row) for row in table.to_pylist()]
