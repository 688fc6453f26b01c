"""Stores the checkpoints of a training run. All ranks write their shards together and agree on success."""

import contextlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from safetensors import SafetensorError

from ardiff import distributed
from ardiff.data import storage
from ardiff.errors import DataError, TrainingError
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState, write_state, write_tensors
from ardiff.train.engines.base import Engine
from ardiff.train.export import MODEL
from ray_jobs.training.job import TrainJob

logger = logging.getLogger(__name__)


class CheckpointCallback(TrainingCallback):
    """Stores every checkpoint, registers it with Ray Train, and keeps a copy of the best one."""

    def __init__(
        self,
        job: TrainJob,
        engine: Engine,
        discriminator: Engine | None,
        attempt: str,
        progress: Any,
        flush_logs: Callable[[], None],
    ) -> None:
        """
        Args:
            attempt: Added to folder names, because shards of different attempts must not mix.
            flush_logs: Called with every checkpoint, so that the stored logs reach at least as far.
        """
        self.job, self.engine, self.discriminator = job, engine, discriminator
        self.attempt, self.progress, self.flush_logs = attempt, progress, flush_logs
        self.is_leader = distributed.rank() == 0
        self.losses: list[float] = []
        """Losses since the last checkpoint."""
        self.failed_saves = 0
        """Consecutive checkpoints that were not stored."""

    def on_step_end(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def on_checkpoint(self, state: TrainState) -> None:
        """Stores a checkpoint. A failure is logged, and training continues without it.

        Raises TrainingError after more than ``save_patience`` consecutive failures.
        """
        loss, started = statistics.fmean(self.losses), time.monotonic()
        is_candidate = self._has_whole_interval(state.step)
        self.losses.clear()
        uri = storage.join(self.job.checkpoints, f"checkpoint-{state.step:08d}-{self.attempt}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            failure = self._on_all_ranks(lambda: self._write(folder)) or self._on_all_ranks(self.flush_logs)
            failure = failure or self._upload(folder, uri, state)
            if failure:
                self._handle_save_failure(state.step, failure)
                return
            self.failed_saves = 0
            seconds = round(time.monotonic() - started, 3)
            logger.info("checkpoint stored", extra={"fields": {"uri": uri, "seconds": seconds, "mean_loss": loss}})
            self._register(uri, state.step, loss)
            failure = self._keep_if_best(folder, state, loss) if is_candidate else ""
        if failure and self.is_leader:
            self._print(f"step {state.step} is the best one, but its copy could not be stored: {failure}")

    def _print(self, line: str) -> None:
        self.progress.log.remote(f"{self.job.name}: {line}")

    def _write(self, folder: Path) -> None:
        """Writes this rank's shards, and on rank 0 the model's description, into a local folder."""
        write_tensors(folder, self.engine, self.discriminator)
        if self.is_leader:
            (folder / MODEL).write_text(json.dumps(self.job.description))

    def _upload(self, folder: Path, uri: str, state: TrainState) -> str:
        """Copies the files of all ranks to ``uri`` and marks the checkpoint as complete.

        Deletes an incomplete checkpoint. Returns the error message on every rank, empty on success.
        """
        failure = self._on_all_ranks(lambda: storage.upload_folder(folder, uri))
        failure = failure or self._on_leader(lambda: write_state(uri, state))
        if failure and self.is_leader:
            with contextlib.suppress(DataError):
                storage.delete_folder(uri)
        return failure

    def _register(self, uri: str, step: int, loss: float) -> None:
        """Registers the checkpoint with Ray Train, which resumes from it after a failure."""
        filesystem, path = storage.open_filesystem(uri, retry=True)
        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=ray.train.Checkpoint(path, filesystem),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _on_all_ranks(self, write: Callable[[], None]) -> str:
        """Calls ``write`` on every rank. Returns an error message on every rank if it failed on any, else an empty
        one."""
        failure = ""
        try:
            write()
        except (DataError, OSError, SafetensorError) as error:
            failure = str(error)
        [failures] = distributed.sum_over([float(bool(failure))], self.engine.device)
        return failure or (f"{int(failures)} of {distributed.size()} workers could not write." if failures else "")

    def _on_leader(self, write: Callable[[], None]) -> str:
        """Like :meth:`_on_all_ranks`, but calls ``write`` on rank 0 only."""
        return self._on_all_ranks(write if self.is_leader else lambda: None)

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

    def _keep_if_best(self, folder: Path, state: TrainState, loss: float) -> str:
        """Copies a checkpoint with the lowest mean loss so far to ``best``. Returns an error message, empty on
        success."""
        if not self._is_best(loss):
            return ""
        name = f"step-{state.step:08d}-{self.attempt}"
        best = {"step": state.step, "loss": loss, "checkpoint": name}
        return self._upload(folder, storage.join(self.job.best, name), state) or self._on_leader(
            lambda: self._replace_best(best)
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
        return bool(distributed.sum_over([float(is_best)], self.engine.device)[0])

    def _replace_best(self, best: dict[str, Any]) -> None:
        """Writes the name of the best checkpoint and deletes the previous one."""
        file = self.job.best_file
        old = json.loads(storage.read_bytes(file))["checkpoint"] if storage.exists(file) else None
        storage.write_bytes(file, json.dumps(best).encode())
        if old is not None:
            storage.delete_folder(storage.join(self.job.best, old))
