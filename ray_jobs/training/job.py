"""Training on Ray Train: one function that runs a task on every worker, whatever the task.

A worker draws its share of every batch through Ray Data from a :class:`ardiff.data.streams.Stream`, beginning at the
position that the last registered checkpoint names. Workers write their shares of a checkpoint into the run's storage (a
local folder or S3) and then report it to Ray Train, which hands the last one back after any restart.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
import ray
import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from rich.markup import escape

from ardiff import distributed, logs
from ardiff.data import storage
from ardiff.data.streams import Stream
from ardiff.errors import ArdiffError, CheckpointError, ConfigError, DataError, TrainingError
from ardiff.train.checkpoint import STATE, TrainState, changed_settings, load_checkpoint
from ardiff.train.checks import SHARD_MORE, explain_failures
from ardiff.train.config import TrainConfig
from ardiff.train.engines.factory import make_discriminator_engine, make_engine
from ardiff.train.export import write_trained
from ardiff.train.loop import train
from ardiff.train.tasks import Task
from ray_jobs.runtime.cluster import await_resource, resolve_device
from ray_jobs.runtime.console import print_line
from ray_jobs.runtime.progress import remote_progress, report_errors
from ray_jobs.training.attempts import TrainingProgress
from ray_jobs.training.batches import PacedExecution, ray_batches
from ray_jobs.training.callbacks import BEST, HISTORY, Observer

logger = logging.getLogger(__name__)
SNAPSHOT, RESULTS = "checkpoint_manager_snapshot.json", "checkpoint_results"
"""Ray Train's list of a run's checkpoints, and where in it they are."""
LOST = "a worker died without a word, as it does when the system kills it for lack of memory"


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Everything that a worker needs; it is shipped to it, so it holds descriptions, not models."""

    name: str
    """Shown beside the progress bar."""
    folder: str
    """Where logs, samples and checkpoints go."""
    fingerprint: str
    """Names what must not change between interruption and resumption."""
    config: TrainConfig
    stream: Stream
    make_task: Callable[[], Task]
    """Builds the task, with fresh weights drawn from the seed."""
    record: Callable[[], None]
    """Called before the first step, once it is known that the folder holds no other run."""
    description: dict[str, Any]
    """What the weights are of, see :func:`ardiff.train.export.write_trained`; kept in every checkpoint."""
    result: str
    """Where the trained model is written at the end."""
    resume: str = "auto"
    """``auto``, ``latest``, ``none`` or the place of a checkpoint."""

    @property
    def checkpoints(self) -> str:
        """Where Ray Train keeps the run's checkpoints."""
        return storage.join(self.folder, "ray")


def run_training(job: TrainJob) -> dict[str, list[list[float]]]:
    """Trains to the end, going on from the last checkpoint if there is one.

    Returns:
        The logged history: for each quantity a list of ``[step, value]``.

    Raises:
        ArdiffError: What stopped the training.
    """
    config, device = job.config, resolve_device(job.config.device)
    _check_room(config, device)
    job = _prepare_resumption(job)
    # Ray Train restores the latest registered checkpoint of a run of the same name in the same storage.
    filesystem, path = storage.open_filesystem(job.folder, retry=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    with remote_progress(job.name, config.num_steps, "step", TrainingProgress) as progress:
        callbacks: Any = [_FailedAttempts(progress)] if config.max_failures else None
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "progress": progress},
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(**_scaling(device, config)),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=path,
                storage_filesystem=filesystem,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                callbacks=callbacks,
            ),
        )
        try:
            with _interruptible():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _reason(error, job, ray.get(progress.last_failure.remote())) from error
    history: dict[str, list[list[float]]] = json.loads(storage.read_bytes(storage.join(job.folder, HISTORY)))
    return history


class _FailedAttempts(ray.train.UserCallback):
    """Reports every failed attempt to the progress actor; Ray Train's controller calls it."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it tries again, or gives up."""
        self.progress.end_attempt.remote(LOST)


def _reason(error: ray.train.TrainingFailedError, job: TrainJob, blame: str) -> TrainingError:
    """Why training failed; ``blame`` is what a worker said, if one did."""
    if isinstance(error, ray.train.ControllerError):
        return TrainingError(
            f"Ray Train could not go on, although no worker failed: {_told(error.controller_failure)}. See that "
            f"{job.checkpoints}, where it lists the checkpoints, can be reached and has room: the same command goes on "
            "from the last one."
        )
    times = f" {job.config.max_failures + 1} times" if job.config.max_failures > 0 else ""
    return TrainingError(
        f"Training failed{times}: {blame or LOST}. The last checkpoint is good; with --debug the same command shows "
        "the workers' output."
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt again around ``fit``, which sets a handler that ends the process as if all were
    well, and leaves it there."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _check_room(config: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError if the cluster has no room for the workers and gets none: Ray Train would wait for ever."""
    setting = "min_workers" if config.min_workers else "num_workers"
    count = config.min_workers or config.num_workers
    needs: dict[Literal["CPU", "GPU"], int] = {"GPU": count} if device.type == "cuda" else {}
    for kind, need in {**needs, "CPU": count * config.cpu_threads + 1}.items():
        if (have := await_resource(kind, need)) < need:
            parts = f" (train.cpu_threads={config.cpu_threads} each, and one to load data)" if kind == "CPU" else ""
            raise ConfigError(
                f"train.{setting}={count} needs {need} {kind}s{parts}, but the Ray cluster has {have}: lower it or "
                "add nodes."
            )


def _prepare_resumption(job: TrainJob) -> TrainJob:
    """Does to the run's folder what ``job.resume`` says; returns the job as it is to begin.

    Without a list of checkpoints that Ray Train can go on from, it begins at the newest complete checkpoint.

    Raises CheckpointError.
    """
    if job.resume == "none":
        for name in ("ray", "best", "tensorboard"):
            storage.delete_folder(storage.join(job.folder, name))
        storage.delete_file(storage.join(job.folder, HISTORY))
        return job
    if job.resume not in ("auto", "latest") and not storage.exists(storage.join(job.resume, STATE)):
        raise CheckpointError(f"resume={job.resume} is neither auto, latest, none nor the folder of a checkpoint.")
    try:
        if registered_checkpoints(job.checkpoints):
            return job
    except CheckpointError as error:
        place = storage.join(job.checkpoints, SNAPSHOT)
        storage.write_bytes(f"{place}.damaged", storage.read_bytes(place))
        storage.delete_file(place)
        print_line(f"[yellow]{escape(str(error))}[/] It was put aside as {SNAPSHOT}.damaged.")
    folders = _checkpoint_folders(job.checkpoints)
    if complete := [name for name in folders if storage.exists(storage.join(job.checkpoints, name, STATE))]:
        print_line(f"{job.name}: beginning at the newest complete checkpoint, {complete[-1]}")
        return replace(job, resume=storage.join(job.checkpoints, complete[-1]))
    if job.resume == "latest":
        raise CheckpointError(f"There is no checkpoint in {job.folder} to go on from: resume=auto starts afresh.")
    return job


def registered_checkpoints(place: str) -> list[str]:
    """The folders on Ray Train's list of a run's checkpoints in ``place``.

    Raises CheckpointError if the list is torn or a checkpoint on it is gone, which Ray Train would not bear.
    """
    snapshot = storage.join(place, SNAPSHOT)
    if not storage.exists(snapshot):
        return []
    try:
        names = [str(result["checkpoint_dir_name"]) for result in json.loads(storage.read_bytes(snapshot))[RESULTS]]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"Ray Train's list of checkpoints, {snapshot}, is damaged.") from error
    for name in names:
        if not storage.exists(storage.join(place, name, STATE)):
            raise CheckpointError(f"Ray Train's list of checkpoints, {snapshot}, names {name}, which is not complete.")
    return names


def _checkpoint_folders(place: str) -> list[str]:
    """The names of all folders of checkpoints in ``place``, complete or not, by their steps."""
    files = storage.list_files(place) if storage.exists(place) else []
    names = [file[len(place.rstrip("/")) + 1 :].partition("/") for file in files]
    return sorted({name for name, below, _ in names if below and name.startswith(("checkpoint-", "step-"))})


def _scaling(device: torch.device, config: TrainConfig) -> dict[str, Any]:
    """How many workers, with what each (Ray Train's annotations do not know yet that a pair is elastic)."""
    gpu = device.type == "cuda"
    return {
        "num_workers": (config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
        "elastic_resize_monitor_interval_s": config.resize_interval,
        "use_gpu": gpu,
        "resources_per_worker": {"CPU": config.cpu_threads, **({"GPU": 1} if gpu else {})},
    }


def _train_worker(arguments: dict[str, Any]) -> None:
    """Runs on every worker. Errors that a retry cannot mend go to the driver; all others Ray Train retries."""
    job, progress = arguments["job"], arguments["progress"]
    if ray.get(progress.failure.remote()) is not None:
        return  # Ray Train tries again, but it was told that this is of no use
    logs.set_up()  # Ray Train has set up its own since the process began
    logs.set_context(rank=distributed.rank(), world_size=distributed.size())
    try:
        with report_errors(progress):
            try:
                _train_task(job, progress)
            except ArdiffError as error:
                raise _with_names(error, job.stream) from error
    except Exception as error:
        logger.exception("This worker's training has failed.")
        told = ray.get(progress.failure.remote()) is not None
        if not told:
            who = f"worker {distributed.rank()}"
            notes = [note.removeprefix(f"{who} ") for note in getattr(error, "__notes__", [])]
            when = ", ".join(notes) or "before the first step"
            ray.get(progress.report_failure.remote(who, f"{when}: {_told(error)}"))
        if not told or distributed.size() > 1:  # the others wait for this worker, until Ray Train ends them
            raise


def _told(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _with_names(error: ArdiffError, stream: Stream) -> ArdiffError:
    """The error, with what a user knows the samples by that it speaks of."""
    if isinstance(error, TrainingError) and (found := re.search(r"samples (\d+) to (\d+)", str(error))):
        first, last = int(found[1]), min(int(found[2]), int(found[1]) + 31)
        names: list[str] = []
        for chunk in range(stream.locate(first)[0], stream.locate(last)[0] + 1):
            start = stream.start(chunk)
            names += stream.names(chunk)[max(first - start, 0) : last + 1 - start]
        more = ", ..." if last < int(found[2]) else ""
        return TrainingError(str(error).replace(found[0], f"{found[0]} ({', '.join(dict.fromkeys(names))}{more})"))
    return error


def _train_task(job: TrainJob, progress: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)
    torch.set_num_threads(job.config.cpu_threads)
    device = ray.train.torch.get_device()
    with explain_failures("while building the model", SHARD_MORE):
        task = job.make_task()
        engine = make_engine(task.model, job.config, device)
        discriminator = (
            None if task.discriminator is None else make_discriminator_engine(task.discriminator, job.config, device)
        )
    start = TrainState(0, 0, job.fingerprint)
    ours = job.config.hyperparameters
    with explain_failures("while reading the checkpoint", SHARD_MORE), _checkpoint_to_resume(job) as (folder, named):
        if folder is not None:
            start = load_checkpoint(folder, engine, job.fingerprint, discriminator, None if named else ours)
            if named and start.step >= job.config.num_steps:
                raise CheckpointError(
                    f"{job.resume} is at step {start.step}, and steps are counted on: train.num_steps="
                    f"{job.config.num_steps} leaves nothing to do."
                )
            changes = changed_settings(start.hyperparameters, ours)
            if changes and distributed.rank() == 0:
                progress.log.remote(f"{job.name}: going on with {changes}")
    if distributed.rank() == 0:
        job.record()
        _tidy(job)
    observer = Observer(job, engine, discriminator, start.step, progress)
    if start.step < job.config.num_steps:
        batches = ray_batches(job.stream, start.samples, job.config, distributed.rank(), progress)
        train(task, engine, batches, job.config, start, [observer], discriminator=discriminator)
    with explain_failures("while writing the trained model", SHARD_MORE):
        weights = engine.ema_weights()
        if distributed.rank() == 0:
            write_trained(job.description, weights, job.result)
    observer.close()


@contextlib.contextmanager
def _checkpoint_to_resume(job: TrainJob) -> Iterator[tuple[Path | None, bool]]:
    """A local copy of the checkpoint to begin at, the run's last one or else the one that the configuration names; and
    whether it is the latter, of another run."""
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            yield Path(folder), False
    elif job.resume in ("auto", "latest", "none"):
        yield None, False
    else:
        named = not job.resume.startswith(f"{job.checkpoints}/")
        if storage.is_remote(job.resume):
            with tempfile.TemporaryDirectory() as copy:
                storage.download_folder(job.resume, Path(copy))
                yield Path(copy), named
        else:
            yield Path(job.resume), named


def _tidy(job: TrainJob) -> None:
    """Deletes what earlier attempts have left of checkpoints that are on no list, complete or not."""
    with contextlib.suppress(CheckpointError, DataError):  # a storage or a list that fails now is no reason to stop
        kept = {*registered_checkpoints(job.checkpoints), job.resume.rstrip("/").rpartition("/")[2]}
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            kept.add(checkpoint.path.rstrip("/").rpartition("/")[2])
        if storage.exists(pointer := storage.join(job.folder, BEST)):
            kept.add(json.loads(storage.read_bytes(pointer))["checkpoint"])
        for place in (job.checkpoints, storage.join(job.folder, "best")):
            for name in set(_checkpoint_folders(place)) - kept:
                storage.delete_folder(storage.join(place, name))


def loss_note(history: dict[str, list[list[float]]]) -> str:
    """The last logged loss, for the record of a stage."""
    step, loss = history["loss"][-1]
    return f"{int(step)} steps, loss {loss:.4f}"
