"""The training stream of videos of several shapes and lengths: every batch is of one bucket.

The bucket of a batch is a function of (seed, epoch), and each bucket has an endless :class:`ClipStream` of its own. So
the position is one integer, as without buckets.

Shapes: N videos, E batches of an epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from einops import rearrange

from ardiff.data.buckets import lengths_of, shapes_of
from ardiff.data.config import ClipConfig
from ardiff.data.error_log import BadSample
from ardiff.data.streams import MAX_CHUNK_BYTES, MAX_CHUNK_CLIPS, ClipStream, Columns, Stream
from ardiff.errors import ConfigError
from ardiff.randomness import derive_seed, numpy_generator
from ardiff.resolution import Resolution


def clip_stream(
    videos: pa.Table,
    clips: ClipConfig,
    shapes: Sequence[Resolution],
    seed: int,
    batch_size: int,
    report: Callable[[BadSample], None] | None = None,
) -> Stream:
    """The clips of videos, fitted to the shape of frames that wastes the least of each, and with the first of the
    lengths that it is long enough for.

    Args:
        videos: Rows of a manifest.
        clips: The clips.
        shapes: Those that the model knows. A single one needs no buckets, unless there are several lengths.
        seed: Of the order.
        batch_size: Clips of a batch.
        report: As of :class:`ClipStream`.

    Raises:
        ConfigError: There are buckets and a batch does not hold whole visits.
    """
    each_length = clips.of_each_length
    if len(shapes) == len(each_length) == 1:
        return ClipStream(videos, clips, shapes[0], seed, report=report)
    if batch_size % clips.clips_per_visit:
        raise ConfigError(
            f"With several shapes or lengths a batch holds whole visits: train.batch_size={batch_size} must be a "
            f"multiple of clips.clips_per_visit={clips.clips_per_visit}."
        )
    largest = max(shape.num_pixels for shape in shapes) * max(clips.all_lengths) * 3
    sizes = range(clips.clips_per_visit, MAX_CHUNK_CLIPS + 1, clips.clips_per_visit)
    whole = [n for n in sizes if batch_size % n == 0]
    chunk_size = max((n for n in whole if n * largest <= MAX_CHUNK_BYTES), default=clips.clips_per_visit)
    bucket_of = shapes_of(videos, shapes) * len(each_length) + lengths_of(videos, clips)  # (N,)
    streams, indices = [], []
    for bucket in np.unique(bucket_of).tolist():
        index, length = divmod(bucket, len(each_length))
        own, own_seed = videos.filter(pa.array(bucket_of == bucket)), derive_seed("bucket", seed, bucket)
        streams.append(ClipStream(own, each_length[length], shapes[index], own_seed, report, chunk_size))
        indices.append(index)
    return BucketStream(tuple(streams), tuple(indices), seed, batch_size)


@dataclass(frozen=True, slots=True)
class BucketStream:
    """Clips of several shapes and lengths. Samples are those of :class:`ClipStream`, and ``shape`` int64: the index of
    the shape.

    An epoch has about as many batches as the clips of all visits fill. A bucket gets its share of them, rounded but at
    least one, in a random order. It goes on where its last batch ended, so none of its videos is left out.
    """

    streams: tuple[ClipStream, ...]
    """One for each bucket that has videos, all with chunks of one size, which divides ``batch_size``."""
    indices: tuple[int, ...]
    """The index of each stream's shape among those of the model."""
    seed: int
    batch_size: int

    @property
    def chunk_size(self) -> int:
        """Clips of a chunk."""
        return self.streams[0].chunk_size

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches of each bucket in an epoch."""
        clips = [int(stream.visits[-1]) * stream.clips.clips_per_visit for stream in self.streams]
        return tuple(max(round(count / self.batch_size), 1) for count in clips)

    def locate(self, position: int) -> tuple[int, int]:
        return divmod(position, self.chunk_size)

    def start(self, chunk: int) -> int:
        return chunk * self.chunk_size

    def load(self, chunk: int, rows: np.ndarray | None = None) -> Columns:
        """Raises DataError as :class:`ClipStream`."""
        bucket, own_chunk = self.bucket(chunk)
        samples = self.streams[bucket].load(own_chunk, rows)
        return {**samples, "shape": np.full_like(samples["label"], self.indices[bucket])}

    def names(self, chunk: int) -> list[str]:
        bucket, own_chunk = self.bucket(chunk)
        return self.streams[bucket].names(own_chunk)

    @property
    def chunk_bytes(self) -> int:
        return max(stream.chunk_bytes for stream in self.streams)

    def pack(self, samples: Columns) -> Columns:
        """Samples whose ``video`` is flat and padded to the bytes of the largest clip, ``(n, bytes)``, with the numbers
        of their frames as ``num_frames``.

        Ray Data joins and cuts blocks as it likes, which needs rows of one size.
        """
        flat = rearrange(samples["video"], "n f h w c -> n (f h w c)")
        missing = self.chunk_bytes // self.chunk_size - flat.shape[1]
        frames = np.full_like(samples["shape"], samples["video"].shape[1])
        return {**samples, "video": np.pad(flat, ((0, 0), (0, missing))), "num_frames": frames}

    def unpack(self, samples: Columns) -> Columns:
        """The inverse of :meth:`pack`, for samples of one bucket."""
        others = {name: values for name, values in samples.items() if name not in ("video", "num_frames")}
        [(index, frames)] = set(zip(samples["shape"].tolist(), samples["num_frames"].tolist(), strict=True))
        shape = (frames, *self.streams[self.indices.index(index)].resolution, 3)
        flat = samples["video"][:, : math.prod(shape)]
        return {**others, "video": flat.reshape(-1, *shape)}

    def bucket(self, chunk: int) -> tuple[int, int]:
        """The bucket of a chunk, and which chunk of the bucket's own stream it is."""
        per_batch = self.batch_size // self.chunk_size
        batch, index_in_batch = divmod(chunk, per_batch)
        epoch, index = divmod(batch, sum(self.batches))
        order = _bucket_order(self.seed, epoch, self.batches)  # (E,)
        bucket = int(order[index])
        before = epoch * self.batches[bucket] + int((order[:index] == bucket).sum())
        return bucket, before * per_batch + index_in_batch


@lru_cache(maxsize=8)
def _bucket_order(seed: int, epoch: int, batches: tuple[int, ...]) -> np.ndarray:
    """The bucket of each batch of an epoch, int64 ``(E,)``."""
    order = np.repeat(np.arange(len(batches)), batches)
    return numpy_generator("buckets", seed, epoch).permutation(order)
