"""Logs a training run: progress bar, history, TensorBoard, Ray metrics, Weights & Biases, sample sheets and traces."""

import importlib
import io
import json
import logging
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray.util.metrics import Gauge
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ardiff import distributed, logs
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import contact_sheet
from ardiff.errors import ConfigError, DataError
from ardiff.train.callbacks import TrainingCallback
from ray_jobs.training.job import TrainJob

logger = logging.getLogger(__name__)
PROGRESS_INTERVAL = 0.5
"""Seconds between updates of the progress bar."""


def new_attempt_id(device: torch.device) -> str:
    """8 random hex digits, equal on all ranks, that keep the files of different attempts apart."""
    [number] = distributed.sum_over([secrets.randbits(32) if distributed.rank() == 0 else 0.0], device)
    return f"{int(number):08x}"


class LoggingCallback(TrainingCallback):
    """Rank 0 logs values and samples; every rank stores its own traces."""

    def __init__(self, job: TrainJob, start: int, attempt: str, progress: Any) -> None:
        """Starts the log of an attempt at step ``start``. Values that the history has of later steps are dropped."""
        self.job, self.attempt, self.progress = job, attempt, progress
        self.is_leader = distributed.rank() == 0
        self.history: dict[str, list[list[float]]] = {}
        logs.set_context(step=start)
        logger.info("training starts", extra={"fields": {"folder": job.folder}})
        if not self.is_leader:
            return
        if start and storage.exists(job.history_file):
            old = json.loads(storage.read_bytes(job.history_file))
            self.history = {name: [point for point in points if point[0] <= start] for name, points in old.items()}
        # TensorBoard appends to its event files, which S3 cannot do: they are uploaded from a local folder in flush().
        self.local_folder = tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.local_folder.name, purge_step=start or None)
        self.gauges: dict[str, Gauge] = {}
        self.wandb = _start_wandb(job) if job.config.wandb_project else None
        self.next_update = 0.0
        self._report_start(start)

    def _report_start(self, start: int) -> None:
        self.progress.begin_attempt.remote()
        self.progress.set.remote(start)
        config = self.job.config
        workers = f"with {distributed.size()} of {config.num_workers} workers" if config.min_workers else ""
        if start or workers:
            event = f"resuming from the checkpoint of step {start}" if start else "starting"
            self._print(f"{event} {workers}".rstrip())

    def _print(self, line: str) -> None:
        self.progress.log.remote(f"{self.job.name}: {line}")

    def on_step_end(self, step: int, loss: float) -> None:
        logs.set_context(step=step)
        now = os.times().elapsed
        if self.is_leader and (now >= self.next_update or step == self.job.config.num_steps):
            self.next_update = now + PROGRESS_INTERVAL
            self.progress.set.remote(step, f"loss {loss:.4f}")

    def on_log(self, step: int, values: dict[str, float]) -> None:
        if not self.is_leader:
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

    def on_samples(self, step: int, videos: Tensor) -> None:
        png = contact_sheet(videos.numpy())
        self.writer.add_image("samples", np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")
        try:
            storage.write_bytes(storage.join(self.job.folder, "samples", f"step-{step:06d}.png"), png)
        except DataError as error:
            self._print(f"the samples of step {step} were not stored: {error}")

    def on_trace(self, content: bytes) -> None:
        """Stores this rank's trace. A trace that cannot be stored does not stop training."""
        name = f"{self.attempt}-worker-{distributed.rank()}.json.gz"
        try:
            storage.write_bytes(storage.join(self.job.folder, "profile", name), content)
        except DataError as error:
            self._print(f"the trace was not stored: {error}")

    def flush(self) -> None:
        """Writes TensorBoard files and history into the run's folder, on rank 0. Raises DataError."""
        if self.is_leader:
            self.writer.flush()
            storage.upload_folder(Path(self.local_folder.name), storage.join(self.job.folder, "tensorboard"))
            storage.write_bytes(self.job.history_file, json.dumps(self.history).encode())

    def close(self) -> None:
        """Ends the log of a finished run. Raises DataError."""
        if self.is_leader:
            self.flush()
            self.writer.close()
            self.local_folder.cleanup()
            if self.wandb is not None:
                self.wandb.finish()


def _start_wandb(job: TrainJob) -> Any:
    """The Weights & Biases run, the same one after every restart. Raises ConfigError without the package."""
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError("train.wandb_project needs the package wandb: pip install wandb.") from error
    run_id = fingerprint(job.folder, job.fingerprint)
    return wandb.init(project=job.config.wandb_project, id=run_id, name=job.folder, resume="allow")
