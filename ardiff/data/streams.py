"""Endless training streams. The order is a function of (seed, epoch), so one integer is the position of training.

A stream is cut into chunks. ``load(chunk)`` is a pure function of the stream and the chunk's index: a chunk can be
loaded anywhere, any number of times, with the same samples in the same order.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa

from ardiff.data import storage
from ardiff.data.clips import read_frames
from ardiff.data.config import ClipConfig
from ardiff.data.error_log import ERRORS, BadSample, bad_sample
from ardiff.data.latents import read_clips
from ardiff.data.manifest import VideoRecord, lengths_at, record_at
from ardiff.data.pictures import crop
from ardiff.data.texts import TextIndex
from ardiff.errors import ClipTooShortError, DataError, DecodeError, StorageError
from ardiff.randomness import numpy_generator
from ardiff.resolution import Resolution

Columns = dict[str, np.ndarray]
MAX_CHUNK_BYTES = 32 * 2**20
"""Bytes of pixels per chunk. Ray Data spills no block of this size in a small object store."""
MAX_CHUNK_CLIPS = 64
"""Clips per chunk."""
REMOTE_READERS = 4
"""Videos that a loading task reads from S3 at the same time."""
MAX_REPLACEMENTS = 8
"""Videos tried for one visit."""


class Stream(Protocol):
    """An endless sequence of samples, cut into chunks."""

    def locate(self, position: int) -> tuple[int, int]:
        """The chunk that holds the sample at ``position``, and the sample's index in it."""

    def start(self, chunk: int) -> int:
        """The position of a chunk's first sample."""

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        """The samples of a chunk, or those with the indices ``rows``, as arrays that share their first axis."""

    def names(self, chunk: int) -> list[str]:
        """The names of a chunk's samples for error messages."""

    @property
    def chunk_bytes(self) -> int:
        """Approximate size of a chunk's samples."""


@dataclass(frozen=True, slots=True)
class ClipStream:
    """Random clips of videos, each a function of (seed, epoch, index).

    A bad video is reported and replaced by another, also a function of (seed, index). This keeps batches full and the
    order the same in every process. Without ``report``, a bad video is an error.

    Samples: ``video`` uint8 ``(F, H, W, 3)`` and ``label`` int64.
    """

    videos: pa.Table
    """Rows of a manifest. A table reaches every loading task without a copy."""
    clips: ClipConfig
    resolution: Resolution
    seed: int
    report: Callable[[BadSample], None] | None = None
    """Records a bad sample; raises DataError if there are too many."""
    chunk_size: int = 0
    """Clips per chunk. 0: as many as fit into 32 MiB, at most 64."""
    visits: np.ndarray = field(init=False)
    """Visits per epoch, summed up to each video."""

    def __post_init__(self) -> None:
        frames, rates = self.videos["num_frames"].to_numpy(), self.videos["fps"].to_numpy()
        lengths = lengths_at(frames, rates, self.clips.fps)
        for short in np.flatnonzero(lengths < self.clips.span)[:1].tolist():
            uri = record_at(self.videos, short).uri
            raise ClipTooShortError(f"{uri} has {lengths[short]} frames, the clip needs {self.clips.span}.")
        visits = np.ones_like(lengths) if self.clips.uniform == "videos" else lengths // self.clips.span
        object.__setattr__(self, "visits", np.cumsum(visits))
        object.__setattr__(self, "chunk_size", self.chunk_size or self._fitting_chunk())
        if self.chunk_size % self.clips.clips_per_visit:
            raise ValueError(f"clips_per_visit must divide {self.chunk_size}, got {self.clips.clips_per_visit}")

    def locate(self, position: int) -> tuple[int, int]:
        return divmod(position, self.chunk_size)

    def start(self, chunk: int) -> int:
        return chunk * self.chunk_size

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        """Raises DataError naming a video that cannot be read or decoded, if there is no ``report``."""
        per_visit = self.clips.clips_per_visit
        numbers = self._order(chunk)[slice(None) if rows is None else rows]
        visits = np.unique(numbers // per_visit).tolist()
        videos = np.empty((len(numbers), self.clips.num_frames, *self.resolution, 3), dtype=np.uint8)
        labels = np.empty(len(numbers), dtype=np.int64)
        with contextlib.ExitStack() as stack:
            loaded: Iterator[tuple[list[list[np.ndarray]], int]] = map(self._visit, visits)
            if storage.is_remote(self.videos["uri"][0].as_py()):  # the threads mostly wait for answers
                loaded = stack.enter_context(ThreadPoolExecutor(REMOTE_READERS)).map(self._visit, visits)
            for visit, (clips, label) in zip(visits, loaded, strict=True):
                for row in np.flatnonzero(numbers // per_visit == visit).tolist():
                    labels[row] = label
                    for target, frame in zip(videos[row], clips[numbers[row] % per_visit], strict=True):
                        target[:] = frame  # the only copy, while the frame is in the processor's cache
        return {"video": videos, "label": labels}

    def names(self, chunk: int) -> list[str]:
        visits = self._order(chunk) // self.clips.clips_per_visit
        return [record_at(self.videos, self._video(visit)[0]).uri for visit in visits.tolist()]

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_size * self._clip_bytes

    @property
    def _clip_bytes(self) -> int:
        return self.clips.num_frames * self.resolution.num_pixels * 3

    def _order(self, chunk: int) -> np.ndarray:
        """The clips of a chunk in training order, numbered by visits over all epochs."""
        order = chunk * self.chunk_size + np.arange(self.chunk_size)
        if self.clips.clips_per_visit > 1:
            order = order[numpy_generator("clips in chunk", self.seed, chunk).permutation(self.chunk_size)]
        return order

    def _video(self, visit: int) -> tuple[int, int]:
        """The video of a visit, and the index of the visit among the video's visits in the epoch."""
        per_epoch = int(self.visits[-1])
        epoch, index = divmod(visit, per_epoch)
        return self._video_of_slot(int(_permutation(self.seed, epoch, per_epoch)[index]))

    def _video_of_slot(self, slot: int) -> tuple[int, int]:
        """The video of a visit before shuffling, and the index of the visit among the video's visits."""
        video = int(np.searchsorted(self.visits, slot, side="right"))
        return video, slot - (int(self.visits[video - 1]) if video else 0)

    def _visit(self, visit: int) -> tuple[list[list[np.ndarray]], int]:
        """The frames of the clips of one visit, and their label. A bad video is replaced by another."""
        index, part = self._video(visit)
        for attempt in range(MAX_REPLACEMENTS):
            key: tuple[int, ...] = (visit, attempt) if attempt else (visit,)
            if attempt:
                replacement = numpy_generator("replacement", self.seed, *key)
                index, part = self._video_of_slot(int(replacement.integers(self.visits[-1])))
            record, generator = record_at(self.videos, index), numpy_generator("clip", self.seed, *key)
            starts = self._starts(index, part, record, generator)
            try:
                return self._read(record, starts, generator), record.label
            except (DecodeError, StorageError) as error:
                if self.report is None:
                    raise DataError(
                        f"{record.uri} can no longer be used ({error}): run `ardiff prepare` again."
                    ) from error
                self.report(bad_sample(record.uri, min(starts), error))
        raise DataError(f"{MAX_REPLACEMENTS} videos in a row could not be used: see {ERRORS}.")

    def _starts(self, index: int, part: int, record: VideoRecord, generator: np.random.Generator) -> list[int]:
        """First frames of the clips of the ``part``-th visit to a video."""
        positions = record.length_at(self.clips.fps) - self.clips.span + 1
        parts = int(self.visits[index]) - (int(self.visits[index - 1]) if index else 0)
        first = part * positions // parts
        last = max((part + 1) * positions // parts, first + 1)
        starts: list[int] = generator.integers(first, last, size=self.clips.clips_per_visit).tolist()
        return starts

    def _read(self, record: VideoRecord, starts: list[int], generator: np.random.Generator) -> list[list[np.ndarray]]:
        """The frames of the clips at ``starts``, cropped and mirrored. The video is read and decoded once."""
        config = self.clips
        flips = generator.random(len(starts)) < 0.5 * config.horizontal_flip
        crops = generator.random((len(starts), 2)) if config.crop == "random" else np.full((len(starts), 2), 0.5)
        frames = [[start + config.stride * i for i in range(config.num_frames)] for start in starts]
        clips = read_frames(record, frames, config.fps, self.resolution)
        fits = clips[0][0].shape[:2] == self.resolution
        if fits and not flips.any():
            return clips
        mirror = [slice(None, None, -1 if flip else 1) for flip in flips]
        return [
            [crop(frame, self.resolution, (y, x))[:, columns] for frame in clip]
            for clip, (y, x), columns in zip(clips, crops, mirror, strict=True)
        ]

    def _fitting_chunk(self) -> int:
        size = MAX_CHUNK_CLIPS
        while size > self.clips.clips_per_visit and size * self._clip_bytes > MAX_CHUNK_BYTES:
            size //= 2
        return size


@dataclass(frozen=True, slots=True)
class LatentStream:
    """Latents of clips. Every epoch shuffles the files, then the clips in groups of files.

    A group is loaded whole, so ``files_per_chunk`` trades memory for mixing. Samples: ``latents`` float32 ``(F, L, D)``
    and ``label`` int64; with texts also ``text`` float16 ``(M, E)``, a caption of the video, and ``text_mask`` bool
    ``(M,)``, all False if it has none.
    """

    files: Sequence[str]
    rows: Sequence[int]
    """Clips in each file."""
    shape: tuple[int, int, int]
    """``(F, L, D)``."""
    seed: int
    files_per_chunk: int = 16
    texts: TextIndex | None = None
    """The captions. One of several is drawn for each position."""
    with_shapes: bool = False
    """Whether samples hold ``shape`` int64 too: the index of the shape of their frames."""

    @property
    def chunks_per_epoch(self) -> int:
        """Groups of files in an epoch."""
        return -(-len(self.files) // self.files_per_chunk)

    def locate(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, sum(self.rows))
        for group in range(self.chunks_per_epoch):
            size = sum(self.rows[i] for i in self._members(epoch, group))
            if offset < size:
                return epoch * self.chunks_per_epoch + group, offset
            offset -= size
        raise AssertionError("a position inside an epoch lies in one of its groups")

    def start(self, chunk: int) -> int:
        epoch, group = divmod(chunk, self.chunks_per_epoch)
        before = _permutation(self.seed, epoch, len(self.files))[: group * self.files_per_chunk]
        return epoch * sum(self.rows) + sum(self.rows[i] for i in before)

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        files = [self.files[i] for i in self._members(*divmod(chunk, self.chunks_per_epoch))]
        numbers = ["label", "shape"] if self.with_shapes else ["label"]
        names = [*numbers, "uri"] if self.texts is not None else numbers
        clips = [read_clips(file, self.shape, names) for file in files]
        latents, columns = np.concatenate([each[0] for each in clips]), pa.concat_tables(each[1] for each in clips)
        chosen = slice(None) if rows is None else rows
        order = self._order(chunk, len(latents))[chosen]
        samples = {"latents": latents[order], **{name: columns[name].to_numpy()[order] for name in numbers}}
        if self.texts is not None:
            uniform = numpy_generator("caption", self.seed, chunk).random(len(latents))[chosen]
            captions = self.texts.choose(columns["uri"].take(order).to_pylist(), uniform)
            samples["text"], samples["text_mask"] = self.texts.load(captions)
        return samples

    @property
    def chunk_bytes(self) -> int:
        clip = 4 * math.prod(self.shape) + (self.texts.caption_bytes if self.texts is not None else 0)
        return clip * sum(self.rows) // self.chunks_per_epoch

    def names(self, chunk: int) -> list[str]:
        members = self._members(*divmod(chunk, self.chunks_per_epoch))
        names = [f"{self.files[i]} row {row}" for i in members for row in range(self.rows[i])]
        return [names[i] for i in self._order(chunk, len(names))]

    def _order(self, chunk: int, size: int) -> np.ndarray:
        return numpy_generator("latents in chunk", self.seed, chunk).permutation(size)

    def _members(self, epoch: int, group: int) -> np.ndarray:
        order = _permutation(self.seed, epoch, len(self.files))
        return order[group * self.files_per_chunk : (group + 1) * self.files_per_chunk]


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return numpy_generator("epoch", seed, epoch).permutation(size)
