"""Endless training streams in an order that (seed, epoch) fixes, so that one integer says where training is.

A stream is cut into chunks. ``load(chunk)`` is a pure function of the stream and the chunk's index: a chunk can be
loaded anywhere, any number of times, and gives the same samples in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from ardiff.data import storage
from ardiff.data.decode import decode_clips
from ardiff.data.latents import read_latents
from ardiff.errors import ClipTooShortError, DataError, DecodeError
from ardiff.randomness import numpy_generator

Columns = dict[str, np.ndarray]


class Stream(Protocol):
    """An endless sequence of samples, cut into chunks."""

    def locate(self, position: int) -> tuple[int, int]:
        """The chunk that holds the sample at ``position``, and the sample's place in it."""

    def start(self, chunk: int) -> int:
        """The position of a chunk's first sample."""

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        """The samples of a chunk, or those at the places ``rows``, as arrays that share their first axis."""

    def names(self, chunk: int) -> list[str]:
        """What a user knows the samples of a chunk by, one name a sample."""


@dataclass(frozen=True, slots=True)
class ClipStream:
    """Random clips of videos, uniform over videos: every epoch visits each video once, in an order of its own.

    Samples: ``video`` uint8 ``(F, H, W, 3)`` and ``label`` int64.
    """

    uris: Sequence[str]
    lengths: Sequence[int]
    """Frames of each video."""
    labels: Sequence[int]
    num_frames: int
    stride: int
    resolution: int
    horizontal_flip: bool
    seed: int
    clips_per_visit: int = 1
    """Clips taken of a video whenever it is read; more cost less decoding and mix less."""
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.clips_per_visit < 1 or self.chunk_size % self.clips_per_visit:
            raise ValueError(f"clips_per_visit must divide {self.chunk_size}, got {self.clips_per_visit}")
        span = (self.num_frames - 1) * self.stride + 1
        for uri, length in zip(self.uris, self.lengths, strict=True):
            if length < span:
                raise ClipTooShortError(f"{uri} has {length} frames, the clip needs {span}.")

    def locate(self, position: int) -> tuple[int, int]:
        return divmod(position, self.chunk_size)

    def start(self, chunk: int) -> int:
        return chunk * self.chunk_size

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        """Raises DataError naming the video that cannot be read or decoded."""
        wanted = self._order(chunk)[slice(None) if rows is None else rows]
        clips = {}
        for visit in np.unique(wanted // self.clips_per_visit).tolist():
            clips[visit] = self._clips(self._video(visit), numpy_generator("clip", self.seed, visit))
        videos = [clips[place // self.clips_per_visit][place % self.clips_per_visit] for place in wanted.tolist()]
        labels = [self.labels[self._video(place // self.clips_per_visit)] for place in wanted.tolist()]
        return {"video": np.stack(videos), "label": np.array(labels, dtype=np.int64)}

    def names(self, chunk: int) -> list[str]:
        return [self.uris[self._video(place // self.clips_per_visit)] for place in self._order(chunk).tolist()]

    def _order(self, chunk: int) -> np.ndarray:
        """The clips of a chunk, numbered in the order of visits over all epochs, in the order of training."""
        order = chunk * self.chunk_size + np.arange(self.chunk_size)
        if self.clips_per_visit > 1:
            order = order[numpy_generator("clips in chunk", self.seed, chunk).permutation(self.chunk_size)]
        return order

    def _video(self, visit: int) -> int:
        epoch, place = divmod(visit, len(self.uris))
        return int(_permutation(self.seed, epoch, len(self.uris))[place])

    def _clips(self, index: int, generator: np.random.Generator) -> list[np.ndarray]:
        """The clips of one visit to a video: read and decoded once."""
        span = (self.num_frames - 1) * self.stride + 1
        starts = generator.integers(self.lengths[index] - span + 1, size=self.clips_per_visit).tolist()
        flips = generator.random(self.clips_per_visit) < 0.5 * self.horizontal_flip
        uri = self.uris[index]
        try:
            clips = decode_clips(storage.read_bytes(uri), starts, self.num_frames, self.stride, self.resolution)
        except (DecodeError, ClipTooShortError) as error:
            raise DataError(f"{uri} cannot be decoded any more ({error}): run `ardiff prepare` again.") from error
        return [clip[:, :, ::-1] if flip else clip for clip, flip in zip(clips, flips, strict=True)]


@dataclass(frozen=True, slots=True)
class LatentStream:
    """Latents of clips: files are shuffled every epoch, then the clips inside groups of files.

    A group is loaded whole, so ``files_per_chunk`` trades memory for how well the order is mixed. Samples: ``latents``
    float32 ``(F, L, D)`` and ``label`` int64.
    """

    files: Sequence[str]
    rows: Sequence[int]
    """Clips in each file."""
    shape: tuple[int, int, int]
    """``(F, L, D)``."""
    seed: int
    files_per_chunk: int = 16

    @property
    def chunks_per_epoch(self) -> int:
        """Groups of files in an epoch."""
        return -(-len(self.files) // self.files_per_chunk)

    def locate(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, sum(self.rows))
        for group in range(self.chunks_per_epoch):
            size = sum(self.rows[i] for i in self._members(epoch, group))
            if place < size:
                return epoch * self.chunks_per_epoch + group, place
            place -= size
        raise AssertionError("a position inside an epoch lies in one of its groups")

    def start(self, chunk: int) -> int:
        epoch, group = divmod(chunk, self.chunks_per_epoch)
        before = _permutation(self.seed, epoch, len(self.files))[: group * self.files_per_chunk]
        return epoch * sum(self.rows) + sum(self.rows[i] for i in before)

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        parts = [read_latents(self.files[i], self.shape) for i in self._members(*divmod(chunk, self.chunks_per_epoch))]
        latents, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = self._order(chunk, len(labels))[slice(None) if rows is None else rows]
        return {"latents": latents[order], "label": labels[order]}

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
