"""Training on Ray Train: one function that runs a task on every worker, whatever the task.

A worker draws its share of every batch through Ray Data from a :class:`ardiff.data.streams.Stream`, beginning at the
position that the last registered checkpoint names. Workers write their shares of a checkpoint into the run's storage (a
local folder or S3) and then report it to Ray Train, which hands the last one back after any restart.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import secrets
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.fs as pafs
import ray
import ray.data
import ray.train
import torch
from PIL import Image
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge
from rich.markup import escape
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ardiff import logs
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import contact_sheet
from ardiff.data.streams import ClipStream, Columns, Stream
from ardiff.errors import ArdiffError, CheckpointError, ConfigError, DataError, TrainingError
from ardiff.train import workers
from ardiff.train.checkpoint import STATE, TrainState, load_checkpoint, write_shards, write_state
from ardiff.train.engine import Engine
from ardiff.train.export import MODEL, write_trained
from ardiff.train.loop import SHARES, TrainConfig, make_critic_engine, make_engine, readable_failures, train
from ardiff.train.tasks import Batch, Task
from ray_jobs.common import (
    MAX_DEATHS,
    attempting,
    await_resource,
    remote_progress,
    resolve_device,
    say,
    telling,
)

logger = logging.getLogger(__name__)
HISTORY = "history.json"
BEST = "best/best.json"
SNAPSHOT, RESULTS = "checkpoint_manager_snapshot.json", "checkpoint_results"
"""Ray Train's list of a run's checkpoints, and where in it they are."""
LOST = "a worker died without a word, as it does when the system kills it for lack of memory"
CHUNKS_AT_ONCE = 8192
"""Chunks of a stream that one Ray Data pipeline loads: it lists them all beforehand."""
CHUNKS_PER_TASK = 4
"""Chunks that a task of Ray Data loads one after the other: a task costs several milliseconds of its own."""


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
    filesystem, path = storage.open_filesystem(job.folder, patient=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    with remote_progress(job.name, config.num_steps, "step") as monitor:
        callbacks: Any = [_FailedAttempts(monitor)] if config.max_failures else None
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "monitor": monitor},
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
            raise _reason(error, job, ray.get(monitor.blame.remote())) from error
    history: dict[str, list[list[float]]] = json.loads(storage.read_bytes(storage.join(job.folder, HISTORY)))
    return history


class _FailedAttempts(ray.train.UserCallback):
    """Tells the monitor of every attempt that fails; Ray Train's controller calls it."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it tries again, or gives up."""
        self.monitor.end_attempt.remote(LOST)


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
        say(f"[yellow]{escape(str(error))}[/] It was put aside as {SNAPSHOT}.damaged.")
    folders = _checkpoint_folders(job.checkpoints)
    if complete := [name for name in folders if storage.exists(storage.join(job.checkpoints, name, STATE))]:
        say(f"{job.name}: beginning at the newest complete checkpoint, {complete[-1]}")
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


class PacedExecution(ExecutionCallback):
    """Makes Ray Data's executor rest between its rounds.

    While it waits for the trainer to take what is loaded, it polls without a pause (Ray 2.60) and keeps a core busy,
    which on a small machine the training step then lacks.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data after each round."""
        time.sleep(0.01)


def ray_batches(stream: Stream, position: int, config: TrainConfig, rank: int, monitor: Any) -> Iterator[Batch]:
    """The micro-batches of one worker from ``position`` of the stream to the end of training, loaded ahead.

    Every batch is the next ``batch_size`` samples of the stream, and a worker's share the ``rank``-th part of them,
    whatever Ray Data does: it is told to preserve the order, and each worker loads its own samples. An ArdiffError of
    the stream is told to the ``monitor``.
    """
    total = config.num_steps * config.batch_size
    while position < total:
        chunk, _ = stream.locate(position)
        end = stream.start(chunk + CHUNKS_AT_ONCE) // config.batch_size * config.batch_size
        end = min(total, max(end, position + config.batch_size))
        yield from _ray_batches(stream, position, end, config, rank, monitor)
        position = end


def _ray_batches(
    stream: Stream, position: int, end: int, config: TrainConfig, rank: int, monitor: Any
) -> Iterator[Batch]:
    chunks = range(stream.locate(position)[0], stream.locate(end - 1)[0] + 1)
    parts = config.parts(rank, workers.size())
    places = {chunk: shared_rows(stream, chunk, position, end, parts, config.batch_size) for chunk in chunks}
    mine = [chunk for chunk in chunks if len(places[chunk])]

    def load(row: Any) -> Any:
        chunk = mine[int(row["id"][0])]
        with telling(monitor):
            return load_chunk(stream, chunk, places[chunk], monitor, f"worker {rank}, chunk {chunk}")

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


def load_chunk(stream: Stream, chunk: int, rows: np.ndarray, monitor: Any, name: str) -> Columns:
    """The samples of a chunk at ``rows``; clips one after the other if processes died over them, to learn of which.

    Without a ``monitor`` nobody learns. Raises DataError naming the video that ends the processes that read it.
    """
    if monitor is None:
        return stream.load(chunk, rows)
    with attempting(monitor, name) as deaths:
        if deaths < MAX_DEATHS or not isinstance(stream, ClipStream):
            return stream.load(chunk, rows)
        parts = []
        for row in rows.tolist():
            with attempting(monitor, f"{name}, clip {row}") as over_it:
                if over_it >= MAX_DEATHS:
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
    job, monitor = arguments["job"], arguments["monitor"]
    if ray.get(monitor.failure.remote()) is not None:
        return  # Ray Train tries again, but it was told that this is of no use
    logs.set_up()  # Ray Train has set up its own since the process began
    logs.place(rank=workers.rank(), world_size=workers.size())
    try:
        with telling(monitor):
            try:
                _train_task(job, monitor)
            except ArdiffError as error:
                raise _with_names(error, job.stream) from error
    except Exception as error:
        logger.exception("This worker's training has failed.")
        told = ray.get(monitor.failure.remote()) is not None
        if not told:
            who = f"worker {workers.rank()}"
            notes = [note.removeprefix(f"{who} ") for note in getattr(error, "__notes__", [])]
            when = ", ".join(notes) or "before the first step"
            ray.get(monitor.accuse.remote(who, f"{when}: {_told(error)}"))
        if not told or workers.size() > 1:  # the others wait for this worker, until Ray Train ends them
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


def _train_task(job: TrainJob, monitor: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)
    torch.set_num_threads(job.config.cpu_threads)
    device = ray.train.torch.get_device()
    with readable_failures("when it built the model", SHARES):
        task = job.make_task()
        engine = make_engine(task.model, job.config, device)
        critic = None if task.critic is None else make_critic_engine(task.critic, job.config, device)
    start = TrainState(0, 0, job.fingerprint)
    with readable_failures("when it read the checkpoint", SHARES), _checkpoint_to_resume(job) as folder:
        if folder is not None:
            start = load_checkpoint(folder, engine, job.fingerprint, critic)
    if workers.rank() == 0:
        job.record()
        _tidy(job)
    observer = _Observer(job, engine, critic, start.step, monitor)
    if start.step < job.config.num_steps:
        batches = ray_batches(job.stream, start.samples, job.config, workers.rank(), monitor)
        train(task, engine, batches, job.config, start, observer, critic=critic)
    with readable_failures("when it wrote the trained model", SHARES):
        weights = engine.averaged_weights()
        if workers.rank() == 0:
            write_trained(job.description, weights, job.result)
    observer.close()


@contextlib.contextmanager
def _checkpoint_to_resume(job: TrainJob) -> Iterator[Path | None]:
    """A local copy of the checkpoint to begin at: the run's last one, or else the one that the configuration names."""
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            yield Path(folder)
    elif job.resume in ("auto", "latest", "none"):
        yield None
    elif storage.is_remote(job.resume):
        with tempfile.TemporaryDirectory() as copy:
            storage.download_folder(job.resume, Path(copy))
            yield Path(copy)
    else:
        yield Path(job.resume)


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


class _Observer:
    """Tells the driver's progress bar, TensorBoard, Ray's metrics and the run's folder what happens.

    Every worker has one; it is the first worker's that talks, and all of them store checkpoints together.
    """

    def __init__(self, job: TrainJob, engine: Engine, critic: Engine | None, start: int, monitor: Any) -> None:
        self.job, self.engine, self.critic, self.monitor = job, engine, critic, monitor
        self.leads = workers.rank() == 0
        self.losses: list[float] = []
        self.failed_saves = 0
        # Checkpoints of different attempts must not mix, and all workers have to agree on their names.
        [token] = workers.sum_over([secrets.randbits(32) if self.leads else 0.0], engine.device)
        self.token = f"{int(token):08x}"
        logs.place(step=start)
        logger.info("training begins", extra={"fields": {"device": str(engine.device), "folder": job.folder}})
        self.history: dict[str, list[list[float]]] = {}
        if not self.leads:
            return
        if start and storage.exists(place := storage.join(job.folder, HISTORY)):
            old = json.loads(storage.read_bytes(place))
            self.history = {name: [p for p in points if p[0] <= start] for name, points in old.items()}
        # TensorBoard's event files are appended to, which S3 cannot: they are staged here and copied at checkpoints.
        self.staging = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.staging.name, purge_step=start or None)
        self.gauges: dict[str, Gauge] = {}
        self.wandb = _wandb_run(job) if job.config.wandb_project else None
        self.next_tick = 0.0
        monitor.forgive.remote()
        monitor.set.remote(start)
        team = f"with {workers.size()} of {job.config.num_workers} workers" if job.config.min_workers else ""
        if start or team:
            beginning = f"going on from the checkpoint of step {start}" if start else "starting"
            monitor.say.remote(f"{job.name}: {beginning} {team}".rstrip())

    def progress(self, step: int, loss: float) -> None:
        logs.place(step=step)
        self.losses.append(loss)
        now = os.times().elapsed
        if self.leads and (now >= self.next_tick or step == self.job.config.num_steps):
            self.next_tick = now + 0.5
            self.monitor.set.remote(step, f"loss {loss:.4f}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if not self.leads:
            return
        logger.info("metrics", extra={"fields": values})
        for name, value in values.items():
            self.history.setdefault(name, []).append([step, value])
            self.writer.add_scalar(name, value, step)
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"ardiff_train_{re.sub('[^a-zA-Z0-9_]', '_', name)}", tag_keys=("run",))
            self.gauges[name].set(value, tags={"run": self.job.folder})
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def samples(self, step: int, videos: Tensor) -> None:
        png = contact_sheet(videos.numpy())
        self.writer.add_image("samples", np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")
        try:
            storage.write_bytes(storage.join(self.job.folder, "samples", f"step-{step:06d}.png"), png)
        except DataError as error:
            self.monitor.say.remote(f"{self.job.name}: the samples of step {step} were not stored: {error}")

    def trace(self, content: bytes) -> None:
        """Stores a worker's trace; one that cannot be stored is not worth the run."""
        name = f"{self.token}-worker-{workers.rank()}.json.gz"
        try:
            storage.write_bytes(storage.join(self.job.folder, "profile", name), content)
        except DataError as error:
            self.monitor.say.remote(f"{self.job.name}: the trace was not stored: {error}")

    def checkpoint(self, state: TrainState) -> None:
        """Stores a checkpoint, or says why it could not and lets training go on, as often as is configured.

        Raises TrainingError when patience ends.
        """
        loss, began = statistics.fmean(self.losses), time.monotonic()
        self.losses.clear()
        name = f"checkpoint-{state.step:08d}-{self.token}"
        with tempfile.TemporaryDirectory() as folder:
            place = storage.join(self.job.checkpoints, name)
            failure = self._together(lambda: self._write(Path(folder))) or self._together(self.flush, self.leads)
            failure = failure or self._store(Path(folder), place, state)
            if failure:
                self._bear(state.step, failure)
                return
            self.failed_saves = 0
            seconds = round(time.monotonic() - began, 3)
            logger.info("checkpoint stored", extra={"fields": {"place": place, "seconds": seconds, "mean_loss": loss}})
            filesystem, path = storage.open_filesystem(place, patient=True)
            ray.train.report(
                {"step": state.step, "loss": loss},
                checkpoint=ray.train.Checkpoint(path, filesystem),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )
            if self._is_best(loss):
                best = storage.join(self.job.folder, "best", f"step-{state.step:08d}-{self.token}")
                failure = self._store(Path(folder), best, state) or self._point_to_best(state.step, loss, best)
        if failure and self.leads:
            self.monitor.say.remote(
                f"{self.job.name}: step {state.step} is the best one, but could not be kept as such: {failure}"
            )

    def _write(self, folder: Path) -> None:
        write_shards(folder, self.engine, self.critic)
        if self.leads:
            (folder / MODEL).write_text(json.dumps(self.job.description))

    def _store(self, folder: Path, place: str, state: TrainState) -> str:
        """Copies all workers' files to ``place``, then marks it complete. Says why if that failed, on all of them."""
        failure = self._together(lambda: storage.upload_folder(folder, place))
        if not failure:
            failure = self._together(lambda: write_state(place, state), self.leads)
        if failure and self.leads:
            with contextlib.suppress(DataError):
                storage.delete_folder(place)
        return failure

    def _together(self, write: Callable[[], None], here: bool = True) -> str:
        """Calls ``write`` on the workers where ``here``; if it fails on any, says so on all."""
        failure = ""
        try:
            if here:
                write()
        except (DataError, OSError, SafetensorError) as error:
            failure = str(error)
        [failures] = workers.sum_over([float(bool(failure))], self.engine.device)
        return failure or (f"{int(failures)} of {workers.size()} workers could not write." if failures else "")

    def _bear(self, step: int, failure: str) -> None:
        self.failed_saves += 1
        logger.warning("The checkpoint could not be stored: %s", failure)
        patience = self.job.config.save_patience
        if self.failed_saves > patience:
            raise TrainingError(
                f"The checkpoint of step {step} could not be stored, {self.failed_saves} in a row: {failure} "
                "The last stored checkpoint is good: the same command goes on from it."
            )
        if self.leads:
            self.monitor.say.remote(
                f"{self.job.name}: the checkpoint of step {step} could not be stored "
                f"({self.failed_saves} of {patience} failures borne): {failure}"
            )

    def _is_best(self, loss: float) -> bool:
        """Whether no stored checkpoint followed on a lower mean loss; the first worker decides."""
        better = False
        if self.leads:
            place = storage.join(self.job.folder, BEST)
            with contextlib.suppress(DataError):
                better = not storage.exists(place) or loss < json.loads(storage.read_bytes(place))["loss"]
        return bool(workers.sum_over([float(better)], self.engine.device)[0])

    def _point_to_best(self, step: int, loss: float, place: str) -> str:
        """Names the best checkpoint and deletes the one before it."""

        def point() -> None:
            pointer = storage.join(self.job.folder, BEST)
            old = json.loads(storage.read_bytes(pointer))["checkpoint"] if storage.exists(pointer) else None
            new = place.rpartition("/")[2]
            storage.write_bytes(pointer, json.dumps({"step": step, "loss": loss, "checkpoint": new}).encode())
            if old is not None:
                storage.delete_folder(storage.join(self.job.folder, "best", old))

        return self._together(point, self.leads)

    def flush(self) -> None:
        self.writer.flush()
        storage.upload_folder(Path(self.staging.name), storage.join(self.job.folder, "tensorboard"))
        storage.write_bytes(storage.join(self.job.folder, HISTORY), json.dumps(self.history).encode())

    def close(self) -> None:
        if self.leads:
            self.flush()
            self.writer.close()
            self.staging.cleanup()
            if self.wandb is not None:
                self.wandb.finish()


def _wandb_run(job: TrainJob) -> Any:
    """The run at Weights & Biases, the same one after every restart. Raises ConfigError without the package."""
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError("train.wandb_project needs the package wandb: pip install wandb.") from error
    name = fingerprint(job.folder, job.fingerprint)
    return wandb.init(project=job.config.wandb_project, id=name, name=job.folder, resume="allow")


def loss_note(history: dict[str, list[list[float]]]) -> str:
    """The last logged loss, for the record of a stage."""
    step, loss = history["loss"][-1]
    return f"{int(step)} steps, loss {loss:.4f}"
