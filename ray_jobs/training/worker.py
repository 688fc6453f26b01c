"""What every Ray Train worker runs."""

import logging
import re
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
import torch

from ardiff import distributed, logs
from ardiff.data.streams import Stream
from ardiff.errors import ArdiffError, CheckpointError, TrainingError
from ardiff.train.checkpoint import TrainState, changed_settings, load_checkpoint
from ardiff.train.checks import SHARD_MORE, explain_failures
from ardiff.train.engines.base import Engine
from ardiff.train.engines.factory import make_discriminator_engine, make_engine
from ardiff.train.export import write_trained
from ardiff.train.loop import train
from ray_jobs.runtime.progress import report_errors
from ray_jobs.training.batches import PacedExecution, ray_batches
from ray_jobs.training.callbacks import LoggingCallback, new_attempt_id
from ray_jobs.training.checkpoints import CheckpointCallback
from ray_jobs.training.job import TrainJob
from ray_jobs.training.preemption import end_attempt, is_preempted
from ray_jobs.training.resume import checkpoint_to_resume, delete_stale_checkpoints

logger = logging.getLogger(__name__)
MAX_NAMED_SAMPLES = 32


def train_worker(arguments: dict[str, Any]) -> None:
    """Trains on this rank. Errors that a retry cannot fix are reported to the driver; Ray Train retries all others."""
    job, progress = arguments["job"], arguments["progress"]
    if ray.get(progress.failure.remote()) is not None:
        return  # Ray Train retries although a retry cannot help: let its attempt end at once
    logs.set_up()  # Ray Train has replaced the log handlers since the process started
    logs.set_context(rank=distributed.rank(), world_size=distributed.size())
    preemption: Exception | None = None
    try:
        with report_errors(progress):
            try:
                preemption = _train(job, progress)
            except ArdiffError as error:
                raise add_sample_names(error, job.stream) from error
    except Exception as error:
        logger.exception("Training failed on this worker.")
        is_reported = ray.get(progress.failure.remote()) is not None
        if not is_reported:
            worker = f"worker {distributed.rank()}"
            notes = [note.removeprefix(f"{worker} ") for note in getattr(error, "__notes__", [])]
            when = ", ".join(notes) or "before the first step"
            ray.get(progress.report_failure.remote(worker, f"{when}: {summarize_error(error)}"))
        if not is_reported or distributed.size() > 1:  # other ranks wait in a collective until Ray Train stops them
            raise
    if preemption is not None:
        raise preemption


def summarize_error(error: Exception) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def add_sample_names(error: ArdiffError, stream: Stream) -> ArdiffError:
    """The error with file names added to the positions of samples in its message."""
    if not isinstance(error, TrainingError) or not (match := re.search(r"samples (\d+) to (\d+)", str(error))):
        return error
    first, end = int(match[1]), int(match[2]) + 1
    stop = min(end, first + MAX_NAMED_SAMPLES)
    names: list[str] = []
    for chunk in range(stream.locate(first)[0], stream.locate(stop - 1)[0] + 1):
        start = stream.start(chunk)
        names += stream.names(chunk)[max(first - start, 0) : stop - start]
    more = ", ..." if stop < end else ""
    return TrainingError(str(error).replace(match[0], f"{match[0]} ({', '.join(dict.fromkeys(names))}{more})"))


def _train(job: TrainJob, progress: Any) -> Exception | None:
    """Returns the error to raise if a worker was preempted."""
    _configure_ray_data()
    torch.set_num_threads(job.config.cpu_threads)
    device = ray.train.torch.get_device()
    with explain_failures("while building the model", SHARD_MORE):
        task = job.make_task()
        engine, discriminator = make_engine(task.model, job.config, device), None
        if task.discriminator is not None:
            discriminator = make_discriminator_engine(task.discriminator, job.config, device)
    with explain_failures("while reading the checkpoint", SHARD_MORE):
        start = _restore(job, engine, discriminator, progress)
    if distributed.rank() == 0:
        job.record()
        delete_stale_checkpoints(job)
    attempt = new_attempt_id(device)
    logging_callback = LoggingCallback(job, start.step, attempt, progress)
    checkpoints = CheckpointCallback(job, engine, discriminator, attempt, progress, logging_callback.prepare_flush)
    if start.step < job.config.num_steps:
        batches = ray_batches(job.stream, start.samples, job.config, distributed.rank(), progress)
        callbacks = [logging_callback, checkpoints]
        end = train(
            task, engine, batches, job.config, start, callbacks, discriminator=discriminator, preempted=is_preempted
        )
        if end.step < job.config.num_steps:
            return end_attempt(end.step, device, progress)
    with explain_failures("while writing the trained model", SHARD_MORE):
        weights = engine.ema_weights()
        if distributed.rank() == 0:
            write_trained(job.description, weights, job.result)
    logging_callback.close()
    return None


def _configure_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)


def _restore(job: TrainJob, engine: Engine, discriminator: Engine | None, progress: Any) -> TrainState:
    """Restores the engines from the checkpoint to resume from, if any. Returns the state to start at."""
    hyperparameters = job.config.hyperparameters
    with checkpoint_to_resume(job) as (folder, of_other_run):
        if folder is None:
            return TrainState(0, 0, job.fingerprint)
        required = None if of_other_run else hyperparameters
        start = load_checkpoint(folder, engine, job.fingerprint, discriminator, required)
    if of_other_run and start.step >= job.config.num_steps:
        raise CheckpointError(
            f"{job.resume} is at step {start.step}, and steps count on from there: train.num_steps="
            f"{job.config.num_steps} leaves nothing to do."
        )
    changes = changed_settings(start.hyperparameters, hyperparameters)
    if changes and distributed.rank() == 0:
        progress.log.remote(f"{job.name}: resuming with {changes}")
    return start
