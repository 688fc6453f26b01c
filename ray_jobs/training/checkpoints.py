"""Stores the checkpoints of a training run. All ranks write their shards and agree on success."""

import contextlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
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


@dataclass(slots=True)
class Save:
    """A checkpoint under way: first into Ray Train's folder, then, if it is the best one, into ``best``."""

    state: TrainState
    loss: float
    """Mean loss since the checkpoint before."""
    may_be_best: bool
    uri: str
    """Where the files are copied to."""
    folder: tempfile.TemporaryDirectory[str]
    """Local copy of this rank's files."""
    transfer: Future[None]
    """Writes or copies this rank's files, in a thread."""
    started: float
    is_registered: bool = False
    """Whether Ray Train knows the checkpoint; what is under way then is its copy as the best one."""


class CheckpointCallback(TrainingCallback):
    """Stores every checkpoint, registers it with Ray Train, and keeps a copy of the best one.

    A thread of each rank writes and uploads its files. When all ranks are done, which they learn from the flags of a
    step or by waiting, they mark the checkpoint as complete and register it at the same step.
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
        self.save: Save | None = None
        self.thread = ThreadPoolExecutor(1, "checkpoint")

    def flags(self) -> list[float]:
        """Whether this rank's thread is done, and whether it failed."""
        if self.save is None or not self.save.transfer.done():
            return [0.0, 0.0]
        return [1.0, float(bool(_failure(self.save.transfer)))]

    def on_flags(self, totals: list[float]) -> None:
        num_done, num_failed = totals
        if self.save is not None and num_done == distributed.size():
            self._advance(self.save, int(num_failed))

    def on_step_end(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def on_checkpoint(self, state: TrainState) -> None:
        """Starts to store a checkpoint, after the one under way; waits for it unless ``async_checkpoints`` is set.

        A failure is logged, and training continues without the checkpoint. Raises TrainingError after more than
        ``save_patience`` consecutive failures.
        """
        self.on_end()
        loss, may_be_best = statistics.fmean(self.losses), self._has_whole_interval(state.step)
        self.losses.clear()
        is_async, started = self.job.config.async_checkpoints, time.monotonic()
        shards, flush = local_shards(self.engine, self.discriminator, copy=is_async), self.prepare_flush()
        uri = storage.join(self.job.checkpoints, f"checkpoint-{state.step:08d}-{self.attempt}")
        folder = tempfile.TemporaryDirectory()
        transfer = self.thread.submit(self._write, Path(folder.name), uri, shards, flush)
        self.save = Save(state, loss, may_be_best, uri, folder, transfer, started)
        if not is_async:
            self.on_end()

    def on_end(self) -> None:
        """Waits until no checkpoint is under way. Raises TrainingError like :meth:`on_checkpoint`."""
        while self.save is not None:
            wait([self.save.transfer])
            self._advance(self.save, int(self._count(bool(_failure(self.save.transfer)))))

    def _write(self, folder: Path, uri: str, shards: dict[str, Shard], flush: Callable[[], None]) -> None:
        """Writes this rank's shards, and on rank 0 the model's description, into ``folder`` and copies them to
        ``uri``."""
        write_shards(folder, shards)
        if self.is_leader:
            (folder / MODEL).write_text(json.dumps(self.job.description))
        flush()
        storage.upload_folder(folder, uri)

    def _advance(self, save: Save, num_failed: int) -> None:
        """Completes a transfer that has ended on all ranks. Every rank calls it at the same step.

        An incomplete checkpoint is deleted.
        """
        self.save = None
        failure = self._describe(_failure(save.transfer), num_failed)
        failure = failure or self._on_leader(lambda: write_state(save.uri, save.state))
        if failure and self.is_leader:
            with contextlib.suppress(DataError):
                storage.delete_folder(save.uri)
        if save.is_registered:
            self._complete_best(save, failure)
        elif failure:
            save.folder.cleanup()
            self._handle_save_failure(save.state.step, failure)
        else:
            self._complete(save)

    def _complete(self, save: Save) -> None:
        """Registers a stored checkpoint, and starts its copy if it is the best one."""
        self.failed_saves = 0
        seconds = round(time.monotonic() - save.started, 3)
        logger.info(
            "checkpoint stored", extra={"fields": {"uri": save.uri, "seconds": seconds, "mean_loss": save.loss}}
        )
        self._register(save.uri, save.state.step, save.loss)
        if not (save.may_be_best and self._is_best(save.loss)):
            save.folder.cleanup()
            return
        uri = storage.join(self.job.best, f"step-{save.state.step:08d}-{self.attempt}")
        transfer = self.thread.submit(storage.upload_folder, Path(save.folder.name), uri)
        self.save = replace(save, uri=uri, transfer=transfer, is_registered=True)

    def _complete_best(self, save: Save, failure: str) -> None:
        """Replaces the best checkpoint by a copy that was stored."""
        save.folder.cleanup()
        best = {"step": save.state.step, "loss": save.loss, "checkpoint": save.uri.rpartition("/")[2]}
        failure = failure or self._on_leader(lambda: self._replace_best(best))
        if failure and self.is_leader:
            self._print(f"step {save.state.step} is the best one, but its copy could not be stored: {failure}")

    def _print(self, line: str) -> None:
        self.progress.log.remote(f"{self.job.name}: {line}")

    def _register(self, uri: str, step: int, loss: float) -> None:
        """Registers the checkpoint with Ray Train, which resumes from it after a failure."""
        filesystem, path = storage.open_filesystem(uri, retry=True)
        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=ray.train.Checkpoint(path, filesystem),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _count(self, value: bool) -> float:
        """The number of ranks on which ``value`` is True."""
        return distributed.sum_over([float(value)], self.engine.device)[0]

    def _on_leader(self, write: Callable[[], None]) -> str:
        """Calls ``write`` on rank 0. Returns an error message on every rank if it failed, else an empty one."""
        failure = ""
        if self.is_leader:
            try:
                write()
            except WRITE_ERRORS as error:
                failure = str(error)
        return self._describe(failure, int(self._count(bool(failure))))

    @staticmethod
    def _describe(failure: str, num_failed: int) -> str:
        """An error message on every rank if ``num_failed`` ranks failed, empty if none did."""
        return failure or (f"{num_failed} of {distributed.size()} workers could not write." if num_failed else "")

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

    def _is_best(self, loss: float) -> bool:
        """Whether ``loss`` is lower than that of the best checkpoint. Rank 0 decides for all ranks."""
        is_best = False
        if self.is_leader:
            file = self.job.best_file
            with contextlib.suppress(DataError):
                is_best = not storage.exists(file) or loss < json.loads(storage.read_bytes(file))["loss"]
        return bool(self._count(is_best))

    def _replace_best(self, best: dict[str, Any]) -> None:
        """Writes the name of the best checkpoint and deletes the previous one."""
        file = self.job.best_file
        old = json.loads(storage.read_bytes(file))["checkpoint"] if storage.exists(file) else None
        storage.write_bytes(file, json.dumps(best).encode())
        if old is not None:
            storage.delete_folder(storage.join(self.job.best, old))


def _failure(transfer: Future[None]) -> str:
    """Why a transfer that has ended could not write; empty on success. Raises all other errors."""
    try:
        transfer.result()
    except WRITE_ERRORS as error:
        return str(error)
    return ""
