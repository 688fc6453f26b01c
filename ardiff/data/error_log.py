"""Accounts of what could not be used: one row per bad file or clip, and the share at which a job has to stop."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ardiff.data import storage
from ardiff.data.manifest import Split, VideoRecord
from ardiff.errors import ClipTooShortError, DataError, DecodeError, StorageError

ERRORS = "errors.parquet"
SCHEMA = pa.schema(
    {"uri": pa.string(), "clip": pa.int64(), "error": pa.string(), "message": pa.string(), "attempts": pa.int64()}
)
Unit = Literal["video", "clip"]


@dataclass(frozen=True, slots=True)
class BadClip:
    """Something that could not be used, and why."""

    uri: str
    clip: int
    """The clip's first frame; -1 for the whole file."""
    error: str
    """The kind of error, for counting."""
    message: str
    attempts: int
    """How often it was tried."""


def bad_clip(uri: str, clip: int, error: DataError) -> BadClip:
    """The row for an error. Raises it again if it says that the storage is away: that is no fault of the clip."""
    match error:
        case StorageError():
            if error.transient:
                raise error
            return BadClip(uri, clip, "unreadable", str(error), error.attempts)
        case DecodeError():
            return BadClip(uri, clip, error.kind, str(error), 1)
    return BadClip(uri, clip, "unusable", str(error), 1)


def crashed(uri: str, clip: int, crashes: int) -> BadClip:
    """The row for what ended every process that worked on it."""
    return BadClip(uri, clip, "crashed", "the process that decodes it dies, by a fault or for lack of memory", crashes)


class Quarantine:
    """Counts bad clips, each once, and refuses more than a share of them.

    Args:
        total: Videos or clips in all.
        max_bad_fraction: Share of them that may be bad.
        unit: What is counted: videos of which something was bad, or clips.
        rows: What was found bad before.
        aside: What is left out on purpose, which has rows too but does not count.
    """

    def __init__(
        self,
        total: int,
        max_bad_fraction: float,
        unit: Unit,
        rows: Iterable[BadClip] = (),
        aside: Iterable[BadClip] = (),
    ) -> None:
        self.total, self.max_bad_fraction, self.unit = total, max_bad_fraction, unit
        self.rows = {(row.uri, row.clip): row for row in rows}
        self.aside = list(aside)

    def add(self, bad: BadClip) -> bool:
        """Whether ``bad`` was not known yet."""
        new = (bad.uri, bad.clip) not in self.rows
        self.rows[bad.uri, bad.clip] = bad
        return new

    @property
    def all_rows(self) -> list[BadClip]:
        """What belongs into the file of errors."""
        return [*self.rows.values(), *self.aside]

    @property
    def count(self) -> int:
        """Bad videos or clips."""
        return len({row.uri for row in self.rows.values()}) if self.unit == "video" else len(self.rows)

    def check(self) -> None:
        """Raises DataError if too many are bad; says which errors dominate."""
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


def too_short(records: Iterable[VideoRecord], split: Split, min_frames: int, fps: float = 0.0) -> list[BadClip]:
    """A row for every video that :func:`ardiff.data.manifest.usable` leaves out for its length."""
    mine = ((r.uri, r.length_at(fps)) for r in records if r.status == "ok" and r.split == split)
    need = f"frames{f' at {fps:g} frames/s' if fps else ''}, a clip needs {min_frames}"
    kind = ClipTooShortError.kind
    return [BadClip(uri, -1, kind, f"it has {length} {need}", 1) for uri, length in mine if length < min_frames]


def _example(row: BadClip) -> str:
    message = row.message.rstrip(".")
    return message if row.uri in message else f"{row.uri}: {message}"


def write_errors(uri: str, rows: Iterable[BadClip]) -> None:
    """Writes the rows, sorted, as one Parquet file; an empty one says that nothing was bad."""
    ordered = sorted(rows, key=lambda row: (row.uri, row.clip))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in ordered], schema=SCHEMA), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_errors(uri: str) -> list[BadClip]:
    """The rows of a file of errors; none if there is no file. Raises DataError if it is damaged."""
    if not storage.exists(uri):
        return []
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=SCHEMA)
    except pa.ArrowException as error:
        raise DataError(f"{uri} is not a file of errors ({error}): delete it.") from error
    return [BadClip(**row) for row in table.to_pylist()]
