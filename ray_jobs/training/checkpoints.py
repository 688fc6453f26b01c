"""Stores the checkpoints of a training run. All ranks write their shards and agree on success."""

import contextlib
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray.train
from safetensors import SafetensorError

from ardiff import distributed
from ardiff.data import storage
from ardiff.errors import DataError, TrainingError
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState, local_shards, write_shards, write_state
from ardiff.train.engines.base import Engine
from ardiff.train.export import MODEL
from ardiff.train.shards import Shard
from ray_jobs.training.job import TrainJob

logger = logging.getLogger(__name__)
WRITE_ERRORS = (DataError, OSError, SafetensorError)
"""Errors of storage and of local disks, after which training continues without the checkpoint."""
Stages = Generator[Callable[[], None], str, None]
"""Work for the threads of all ranks, one piece after the other. When a piece has ended on all ranks the generator
continues, at the same step on each, with an error message if the piece failed on any rank, else with an empty one."""


class CheckpointCallback(TrainingCallback):
    """Stores every checkpoint, registers it with Ray Train, and keeps a copy of the best one.

    A thread of each rank writes while training goes on. The ranks learn from the flags of a step, or by waiting, that
    the threads of all have ended a piece of work.
    """

    def __init__(
        self,
        job: TrainJob,
        engine: Engine,
        discriminator: Engine | None,
        attempt: str,
        progress: Any,
        prepare_flush: Callable[[], Callable[[], None]],
    ) -> None:
        """
        Args:
            attempt: Added to folder names, because shards of different attempts must not mix.
            prepare_flush: Called with every checkpoint. What it returns stores the logs, so that they reach at least as
                far.
        """
        self.job, self.engine, self.discriminator = job, engine, discriminator
        self.attempt, self.progress, self.prepare_flush = attempt, progress, prepare_flush
        self.is_leader = distributed.rank() == 0
        self.losses: list[float] = []
        """Losses since the last checkpoint."""
        self.failed_saves = 0
        """Consecutive checkpoints that were not stored."""
        self.best_loss = self._read_best_loss()
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.under_way: tuple[Stages, Future[None]] | None = None
        """The checkpoint that is being stored, and what the thread does for it."""

    def flags(self) -> list[float]:
        """Whether this rank's thread has ended its work, and whether it failed."""
        if self.under_way is None or not self.under_way[1].done():
            return [0.0, 0.0]
        return [1.0, float(bool(_failure(self.under_way[1])))]

    def on_flags(self, totals: list[float]) -> None:
        num_done, num_failed = totals
        if self.under_way is not None and num_done == distributed.size():
            self._continue(*self.under_way, int(num_failed))

    def on_step_end(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def on_checkpoint(self, state: TrainState) -> None:
        """Starts to store a checkpoint, after the one under way; waits for it unless ``async_checkpoints`` is set.

        A failure is logged, and training continues without the checkpoint. Raises TrainingError after more than
        ``save_patience`` consecutive failures.
        """
        self.on_end()
        stages = self._store(state)
        self.under_way = stages, self.thread.submit(next(stages))
        if not self.job.config.async_checkpoints:
            self.on_end()

    def on_end(self) -> None:
        """Waits until no checkpoint is under way. Raises TrainingError like :meth:`on_checkpoint`."""
        while self.under_way is not None:
            stages, work = self.under_way
            wait([work])
            [num_failed] = distributed.sum_over([float(bool(_failure(work)))], self.engine.device)
            self._continue(stages, work, int(num_failed))

    def _continue(self, stages: Stages, work: Future[None], num_failed: int) -> None:
        """Continues with the checkpoint under way after ``work``, which has ended on all ranks."""
        failure = _failure(work)
        if num_failed and not failure:
            failure = f"{num_failed} of {distributed.size()} workers could not write."
        self.under_way = None
        with contextlib.suppress(StopIteration):
            self.under_way = stages, self.thread.submit(stages.send(failure))

    def _store(self, state: TrainState) -> Stages:
        """Stores the checkpoint and, if it is the best one, its copy.

        With ``async_checkpoints`` the first piece of work has a copy of the tensors, so that training may go on.
        """
        started, loss = time.monotonic(), statistics.fmean(self.losses)
        may_be_best = self._has_whole_interval(state.step)
        self.losses.clear()
        shards = local_shards(self.engine, self.discriminator, copy=self.job.config.async_checkpoints)
        flush = self.prepare_flush()
        uri = storage.join(self.job.checkpoints, f"checkpoint-{state.step:08d}-{self.attempt}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            failure = yield lambda: self._write(folder, shards, flush)
            failure = failure or (yield from self._upload(folder, uri, state))
            if failure:
                self._handle_save_failure(state.step, failure)
                return
            self.failed_saves = 0
            seconds = round(time.monotonic() - started, 3)
            logger.info("checkpoint stored", extra={"fields": {"uri": uri, "seconds": seconds, "mean_loss": loss}})
            self._register(uri, state.step, loss)
            if may_be_best and loss < self.best_loss:
                failure = yield from self._keep_as_best(folder, state, loss)
        if failure and self.is_leader:
            self._print(f"step {state.step} is the best one, but its copy could not be stored: {failure}")

    def _print(self, line: str) -> None:
        self.progress.log.remote(f"{self.job.name}: {line}")

    def _write(self, folder: Path, shards: dict[str, Shard], flush: Callable[[], None]) -> None:
        """Writes this rank's shards, and on rank 0 the model's description, into a local folder. Stores the logs."""
        write_shards(folder, shards)
        if self.is_leader:
            (folder / MODEL).write_text(json.dumps(self.job.description))
        flush()

    def _upload(self, folder: Path, uri: str, state: TrainState) -> Generator[Callable[[], None], str, str]:
        """Copies the files of all ranks to ``uri`` and marks the checkpoint as complete.

        Deletes an incomplete checkpoint. Returns the error message on every rank, empty on success.
        """
        failure = yield lambda: storage.upload_folder(folder, uri)
        failure = failure or (yield self._on_leader(lambda: write_state(uri, state)))
        if failure:
            yield self._on_leader(lambda: storage.delete_folder(uri))  # the next start deletes what is left
        return failure

    def _on_leader(self, write: Callable[[], None]) -> Callable[[], None]:
        """``write`` on rank 0, nothing on the other ranks."""
        return write if self.is_leader else lambda: None

    def _register(self, uri: str, step: int, loss: float) -> None:
        """Registers the checkpoint with Ray Train, which resumes from it after a failure."""
        filesystem, path = storage.open_filesystem(uri, retry=True)
        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=ray.train.Checkpoint(path, filesystem),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _handle_save_failure(self, step: int, failure: str) -> None:
        self.failed_saves += 1
        logger.warning("The checkpoint could not be stored: %s", failure)
        patience = self.job.config.save_patience
        if self.failed_saves > patience:
            raise TrainingError(
                f"The checkpoint of step {step} could not be stored, {self.failed_saves} in a row: {failure} "
                "The last stored checkpoint is good: the same command resumes from it."
            )
        if self.is_leader:
            self._print(
                f"the checkpoint of step {step} could not be stored "
                f"({self.failed_saves} of {patience} allowed failures): {failure}"
            )

    def _has_whole_interval(self, step: int) -> bool:
        """Whether the losses are of a whole interval between checkpoints, as they are not before and after a
        preemption."""
        interval, first = self.job.config.checkpoint_every, step - len(self.losses)
        return first % interval == 0 and (step % interval == 0 or step == self.job.config.num_steps)

    def _keep_as_best(self, folder: Path, state: TrainState, loss: float) -> Generator[Callable[[], None], str, str]:
        """Replaces the best checkpoint. Returns the error message on every rank, empty on success."""
        name = f"step-{state.step:08d}-{self.attempt}"
        best = {"step": state.step, "loss": loss, "checkpoint": name}
        failure = yield from self._upload(folder, storage.join(self.job.best, name), state)
        failure = failure or (yield self._on_leader(lambda: self._replace_best(best)))
        self.best_loss = self.best_loss if failure else loss
        return failure

    def _read_best_loss(self) -> float:
        """Mean loss of the best checkpoint of this and earlier attempts, as rank 0 reads it; infinite if there is
        none."""
        loss = 0.0
        if self.is_leader:
            file = self.job.best_file
            loss = json.loads(storage.read_bytes(file))["loss"] if storage.exists(file) else math.inf
        return distributed.sum_over([loss], self.engine.device)[0]

    def _replace_best(self, best: dict[str, Any]) -> None:
        """Writes the name of the best checkpoint and deletes the previous one."""
        file = self.job.best_file
        old = json.loads(storage.read_bytes(file))["checkpoint"] if storage.exists(file) else None
        storage.write_bytes(file, json.dumps(best).encode())
        if old is not None:
            with contextlib.suppress(DataError):  # the next start deletes what is left
                storage.delete_folder(storage.join(self.job.best, old))


def _failure(work: Future[None]) -> str:
    """Why work that has ended could not write; empty on success. Raises all other errors."""
    try:
        work.result()
    except WRITE_ERRORS as error:
        return str(error)
    return ""
