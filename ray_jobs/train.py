"""Training on Ray Train: one function that runs a task on a worker, whatever the task.

The worker draws its batches through Ray Data from a :class:`ardiff.data.streams.Stream`, beginning at the position
that the last registered checkpoint names; it reports checkpoints to Ray Train, which puts them into the run's storage
(a local folder or S3) and hands the last one back after any restart.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ardiff.data import storage
from ardiff.data.encode import contact_sheet
from ardiff.data.streams import Stream
from ardiff.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from ardiff.train.engine import Engine, TorchEngine
from ardiff.train.loop import TrainConfig, train
from ardiff.train.tasks import Batch, Task
from ray_jobs.common import remote_progress, resolve_device, telling

HISTORY = "history.json"


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
    """Called on the worker before the first step, once it is known that the folder holds no other run."""
    export: Callable[[Engine], None]
    """Called on the worker with the final weights."""


def run_training(job: TrainJob) -> dict[str, list[list[float]]]:
    """Trains to the end, going on from the last checkpoint if there is one.

    Returns:
        The logged history: for each quantity a list of ``[step, value]``.

    Raises:
        ArdiffError: What stopped the training, if it is something the user can mend.
    """
    device = resolve_device(job.config.device)
    # Ray Train restores the latest registered checkpoint of a run of the same name in the same storage.
    filesystem, path = storage.open_filesystem(job.folder)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    with remote_progress(job.name, job.config.num_steps, "step") as monitor:
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "monitor": monitor},
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=device.type == "cuda", resources_per_worker=_resources(device, job.config)
            ),
            run_config=ray.train.RunConfig(
                name="ray",
                storage_path=path,
                storage_filesystem=filesystem,
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                failure_config=ray.train.FailureConfig(max_failures=2),
            ),
        )
        trainer.fit()
    history: dict[str, list[list[float]]] = json.loads(storage.read_bytes(storage.join(job.folder, HISTORY)))
    return history


class PacedExecution(ExecutionCallback):
    """Makes Ray Data's executor rest between its rounds.

    While it waits for the trainer to take what is loaded, it polls without a pause (Ray 2.60) and keeps a core busy,
    which on a small machine the training step then lacks.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data after each round."""
        time.sleep(0.01)


def ray_batches(
    stream: Stream, position: int, total: int, batch_size: int, tasks: int, monitor: Any
) -> Iterator[Batch]:
    """Batches of a stream from ``position`` to ``total`` samples, loaded ahead of their use by up to ``tasks`` tasks.

    The order is the stream's own, whatever the tasks' timing: Ray Data is told to preserve it. An ArdiffError of the
    stream is told to the ``monitor``.
    """
    first, skip = stream.locate(position)
    last, _ = stream.locate(total - 1)
    chunks = ray.data.range(last - first + 1, override_num_blocks=last - first + 1)

    def load(row: Any) -> Any:
        chunk = first + int(row["id"][0])
        with telling(monitor):
            columns = stream.load(chunk)
        return {name: values[skip:] for name, values in columns.items()} if chunk == first else columns

    samples = chunks.map_batches(load, batch_size=1, compute=ray.data.TaskPoolStrategy(tasks))
    # A split of one moves Ray Data's executor, a busy Python thread, to an actor: in this process it would hold the
    # interpreter lock while the training step waits for it (four times slower steps were seen).
    [shard] = samples.streaming_split(1)
    for batch in shard.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=4, drop_last=True):
        yield {str(name): torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}


def _resources(device: torch.device, config: TrainConfig) -> dict[str, float]:
    return {"CPU": config.cpu_threads, **({"GPU": 1} if device.type == "cuda" else {})}


def _train_worker(arguments: dict[str, Any]) -> None:
    """Runs on the Ray Train worker. Errors that a retry cannot mend go to the driver; all others Ray Train retries."""
    monitor = arguments["monitor"]
    try:
        with telling(monitor):
            _train_task(arguments["job"], monitor)
    except Exception:
        if ray.get(monitor.failure.remote()) is None:
            raise


def _train_task(job: TrainJob, monitor: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes.append(PacedExecution)
    torch.set_num_threads(job.config.cpu_threads)
    device = ray.train.torch.get_device()
    task = job.make_task()
    config = job.config

    def make_engine(model: nn.Module) -> Engine:
        return TorchEngine(model, config.optimizer, device, config.precision, config.max_grad_norm, config.ema_decay)

    engine = make_engine(task.model)
    critic = None if task.critic is None else make_engine(task.critic)
    start = TrainState(0, 0, job.fingerprint)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            start = load_checkpoint(Path(folder), engine, job.fingerprint, critic)
    job.record()
    observer = _Observer(job, engine, critic, start.step, monitor)
    total = config.num_steps * config.batch_size
    if start.samples < total:
        batches = ray_batches(job.stream, start.samples, total, config.micro_batch_size, config.loading_tasks, monitor)
        train(task, engine, batches, config, start, observer, critic=critic)
    job.export(engine)
    observer.close()


class _Observer:
    """Tells the driver's progress bar, TensorBoard, the run's folder and Ray Train what happens."""

    def __init__(self, job: TrainJob, engine: Engine, critic: Engine | None, start: int, monitor: Any) -> None:
        self.job, self.engine, self.critic, self.monitor = job, engine, critic, monitor
        self.history: dict[str, list[list[float]]] = {}
        place = storage.join(job.folder, HISTORY)
        if start and storage.exists(place):
            old = json.loads(storage.read_bytes(place))
            self.history = {name: [p for p in points if p[0] <= start] for name, points in old.items()}
        # TensorBoard's event files are appended to, which S3 cannot: they are staged here and copied at checkpoints.
        self.staging = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.staging.name, purge_step=start or None)
        self.next_tick = 0.0
        monitor.set.remote(start)
        if start:
            monitor.say.remote(f"{job.name}: going on from the checkpoint of step {start}")

    def progress(self, step: int, loss: float) -> None:
        now = os.times().elapsed
        if now >= self.next_tick or step == self.job.config.num_steps:
            self.next_tick = now + 0.5
            self.monitor.set.remote(step, f"loss {loss:.4f}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append([step, value])
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, videos: Tensor) -> None:
        png = contact_sheet(videos.numpy())
        storage.write_bytes(storage.join(self.job.folder, "samples", f"step-{step:06d}.png"), png)
        self.writer.add_image("samples", np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")

    def checkpoint(self, state: TrainState) -> None:
        self.flush()
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), self.engine, state, self.critic)
            ray.train.report({"step": state.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def flush(self) -> None:
        self.writer.flush()
        storage.upload_folder(Path(self.staging.name), storage.join(self.job.folder, "tensorboard"))
        storage.write_bytes(storage.join(self.job.folder, HISTORY), json.dumps(self.history).encode())

    def close(self) -> None:
        self.flush()
        self.writer.close()
        self.staging.cleanup()


def loss_note(history: dict[str, list[list[float]]]) -> str:
    """The last logged loss, for the record of a stage."""
    step, loss = history["loss"][-1]
    return f"{int(step)} steps, loss {loss:.4f}"
