"""How batches reach a training worker: Ray Data tasks load the chunks of a stream ahead, in the order of samples."""

from __future__ import annotations

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
from ardiff.data.streams import ClipStream, Columns, Stream
from ardiff.errors import DataError
from ardiff.train.config import TrainConfig
from ardiff.train.tasks import Batch
from ray_jobs.runtime.crash_guard import MAX_CRASHES, crash_guard
from ray_jobs.runtime.progress import report_errors

CHUNKS_AT_ONCE = 8192
"""Chunks of a stream that one Ray Data pipeline loads: it lists them all beforehand."""
CHUNKS_PER_TASK = 4
"""Chunks that a task of Ray Data loads one after the other: a task costs several milliseconds of its own."""


class PacedExecution(ExecutionCallback):
    """Makes Ray Data's executor rest between its rounds.

    While it waits for the trainer to take what is loaded, it polls without a pause (Ray 2.60) and keeps a core busy,
    which on a small machine the training step then lacks.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data after each round."""
        time.sleep(0.01)


def ray_batches(stream: Stream, position: int, config: TrainConfig, rank: int, progress: Any) -> Iterator[Batch]:
    """The micro-batches of one worker from ``position`` of the stream to the end of training, loaded ahead.

    Every batch is the next ``batch_size`` samples of the stream, and a worker's share the ``rank``-th part of them,
    whatever Ray Data does: it is told to preserve the order, and each worker loads its own samples. An ArdiffError of
    the stream is reported to the ``progress`` actor.
    """
    total = config.num_steps * config.batch_size
    while position < total:
        chunk, _ = stream.locate(position)
        end = stream.start(chunk + CHUNKS_AT_ONCE) // config.batch_size * config.batch_size
        end = min(total, max(end, position + config.batch_size))
        yield from _ray_batches(stream, position, end, config, rank, progress)
        position = end


def _ray_batches(
    stream: Stream, position: int, end: int, config: TrainConfig, rank: int, progress: Any
) -> Iterator[Batch]:
    chunks = range(stream.locate(position)[0], stream.locate(end - 1)[0] + 1)
    parts = config.micro_batches(rank, distributed.size())
    places = {chunk: shared_rows(stream, chunk, position, end, parts, config.batch_size) for chunk in chunks}
    mine = [chunk for chunk in chunks if len(places[chunk])]

    def load(row: Any) -> Any:
        chunk = mine[int(row["id"][0])]
        with report_errors(progress):
            return load_chunk(stream, chunk, places[chunk], progress, f"worker {rank}, chunk {chunk}")

    # Every chunk becomes a block as soon as it is loaded: Ray Data closes a block once it holds more than this.
    share = sum(len(part) for part in parts) / config.batch_size
    ray.data.DataContext.get_current().target_max_block_size = max(int(0.75 * share * stream.chunk_bytes), 1)
    # Equal concurrency lets Ray Data fuse both into one kind of task, on processes that are started once.
    tasks = config.loading_tasks
    numbers = ray.data.range(len(mine), override_num_blocks=-(-len(mine) // CHUNKS_PER_TASK), concurrency=tasks)
    samples = numbers.map_batches(load, batch_size=1, compute=ray.data.TaskPoolStrategy(tasks))
    # A split of one moves Ray Data's executor, a busy Python thread, to an actor: in this process it would hold the
    # interpreter lock while the training step waits for it (four times slower steps were seen).
    [shard] = samples.streaming_split(1)
    sizes = [len(part) for part in parts]
    for batch in shard.iter_batches(batch_size=sum(sizes), batch_format="numpy", prefetch_batches=2):
        tensors = {str(name): torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
        for values in zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True):
            yield dict(zip(tensors, values, strict=True))


def load_chunk(stream: Stream, chunk: int, rows: np.ndarray, progress: Any, name: str) -> Columns:
    """The samples of a chunk at ``rows``; clips one after the other if processes died over them, to learn of which.

    Without ``progress`` no crashes are counted. Raises DataError naming the video that ends the processes that read it.
    """
    if progress is None:
        return stream.load(chunk, rows)
    with crash_guard(progress, name) as crashes:
        if crashes < MAX_CRASHES or not isinstance(stream, ClipStream):
            return stream.load(chunk, rows)
        parts = []
        for row in rows.tolist():
            with crash_guard(progress, f"{name}, clip {row}") as clip_crashes:
                if clip_crashes >= MAX_CRASHES:
                    raise DataError(
                        f"{stream.names(chunk)[row]} ends the process that reads it, by a fault or for lack of memory: "
                        "take it out of the data set and run `ardiff prepare` again."
                    )
                parts.append(stream.load(chunk, np.array([row])))
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}


def shared_rows(stream: Stream, chunk: int, position: int, end: int, parts: list[range], batch_size: int) -> np.ndarray:
    """The places in a chunk of the samples in ``position..end - 1`` that are in ``parts`` of a batch."""
    places = np.arange(stream.start(chunk), stream.start(chunk + 1))
    inside = places % batch_size
    mine = (inside >= parts[0].start) & (inside < parts[-1].stop)
    return np.flatnonzero(mine & (places >= position) & (places < end))
