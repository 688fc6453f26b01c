"""Batches for a training worker: Ray Data tasks load the chunks of a stream ahead, in the order of the samples."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import torch
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from ardiff import distributed
from ardiff.data.bucket_stream import BucketStream
from ardiff.data.streams import ClipStream, Columns, Stream
from ardiff.errors import DataError
from ardiff.train.config import TrainConfig
from ardiff.train.tasks import Batch
from ray_jobs.runtime.crash_guard import MAX_CRASHES, crash_guard
from ray_jobs.runtime.progress import report_errors

CHUNKS_PER_PIPELINE = 8192
"""Chunks of a stream that one Ray Data pipeline loads. Ray Data lists them all in advance."""
CHUNKS_PER_TASK = 4
"""Chunks that one Ray Data task loads, because a task costs several milliseconds of its own."""


class PacedExecution(ExecutionCallback):
    """Makes Ray Data's executor sleep between its rounds.

    While it waits for the trainer, it polls without a pause (Ray 2.60) and occupies a core, which the training step
    needs on a small machine.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data after each round."""
        time.sleep(0.01)


def ray_batches(stream: Stream, position: int, config: TrainConfig, rank: int, progress: Any) -> Iterator[Batch]:
    """The micro-batches of one rank from ``position`` of the stream to the end of training, loaded ahead.

    Every batch is the next ``batch_size`` samples of the stream, of which each rank loads its own slice, in order. An
    ArdiffError of the stream is reported to the ``progress`` actor.
    """
    total = config.num_steps * config.batch_size
    while position < total:
        chunk, _ = stream.locate(position)
        end = stream.start(chunk + CHUNKS_PER_PIPELINE) // config.batch_size * config.batch_size
        end = min(total, max(end, position + config.batch_size))
        yield from _pipeline_batches(stream, position, end, config, rank, progress)
        position = end


def _pipeline_batches(
    stream: Stream, position: int, end: int, config: TrainConfig, rank: int, progress: Any
) -> Iterator[Batch]:
    """The micro-batches of the samples ``position..end - 1`` from one Ray Data pipeline."""
    micro_batches = config.micro_batches(rank, distributed.size())
    indices = range(micro_batches[0].start, micro_batches[-1].stop)
    chunks = range(stream.locate(position)[0], stream.locate(end - 1)[0] + 1)
    rows = {chunk: rows_of_rank(stream, chunk, position, end, indices, config.batch_size) for chunk in chunks}
    chunks_of_rank = [chunk for chunk in chunks if len(rows[chunk])]

    def load(row: Any) -> Any:
        chunk = chunks_of_rank[int(row["id"][0])]
        with report_errors(progress):
            samples = load_chunk(stream, chunk, rows[chunk], progress, f"worker {rank}, chunk {chunk}")
        return stream.pack(samples) if isinstance(stream, BucketStream) else samples

    # Ray Data closes a block once it holds more than this: every chunk becomes a block as soon as it is loaded.
    share = len(indices) / config.batch_size
    ray.data.DataContext.get_current().target_max_block_size = max(int(0.75 * share * stream.chunk_bytes), 1)
    # Equal concurrency lets Ray Data fuse both operators into one kind of task, on processes that start once.
    count, tasks = len(chunks_of_rank), config.loading_tasks
    numbers = ray.data.range(count, override_num_blocks=-(-count // CHUNKS_PER_TASK), concurrency=tasks)
    samples = numbers.map_batches(load, batch_size=1, compute=ray.data.TaskPoolStrategy(tasks))
    # A split of one moves Ray Data's executor, a busy Python thread, into an actor. In this process it would hold the
    # interpreter lock while the training step waits for it (steps were up to four times slower).
    [split] = samples.streaming_split(1)
    sizes = [len(micro_batch) for micro_batch in micro_batches]
    for batch in split.iter_batches(batch_size=len(indices), batch_format="numpy", prefetch_batches=2):
        columns: Any = batch
        if isinstance(stream, BucketStream):
            columns = stream.unpack(columns)
        tensors = {str(name): _tensor(values) for name, values in columns.items()}
        for values in zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True):
            yield dict(zip(tensors, values, strict=True))


def _tensor(values: Any) -> torch.Tensor:
    """An array as a tensor; float16 becomes float32."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def load_chunk(stream: Stream, chunk: int, rows: np.ndarray, progress: Any, name: str) -> Columns:
    """The samples at ``rows`` of a chunk. If they crashed processes before, loads clips one by one to find the culprit.

    Without ``progress`` no crashes are counted. Raises DataError naming a video that crashes the processes that read
    it.
    """
    if progress is None:
        return stream.load(chunk, rows)
    with crash_guard(progress, name) as crashes:
        if crashes < MAX_CRASHES or not isinstance(stream, ClipStream | BucketStream):
            return stream.load(chunk, rows)
        clips = []
        for row in rows.tolist():
            with crash_guard(progress, f"{name}, clip {row}") as clip_crashes:
                if clip_crashes >= MAX_CRASHES:
                    raise DataError(
                        f"{stream.names(chunk)[row]} crashes the process that reads it, by a fault in FFmpeg or for "
                        "lack of memory: remove it from the data set and run `ardiff prepare` again."
                    )
                clips.append(stream.load(chunk, np.array([row])))
        return {column: np.concatenate([clip[column] for clip in clips]) for column in clips[0]}


def rows_of_rank(stream: Stream, chunk: int, position: int, end: int, indices: range, batch_size: int) -> np.ndarray:
    """The rows of a chunk whose samples are in ``position..end - 1`` and at ``indices`` of their batch."""
    positions = np.arange(stream.start(chunk), stream.start(chunk + 1))
    index = positions % batch_size
    in_indices = (index >= indices.start) & (index < indices.stop)
    return np.flatnonzero(in_indices & (positions >= position) & (positions < end))
