"""Logs a training run: progress bar, history, trackers, Ray metrics, sample sheets and traces."""

import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from typing import Any

import torch
from ray.util.metrics import Gauge
from torch import Tensor

from ardiff import distributed, logs
from ardiff.data import storage
from ardiff.data.encode import contact_sheet, tile
from ardiff.errors import DataError
from ardiff.train.callbacks import TrainingCallback
from ray_jobs.training.job import TrainJob
from ray_jobs.training.trackers import make_trackers

logger = logging.getLogger(__name__)
PROGRESS_INTERVAL = 0.5
"""Seconds between updates of the progress bar."""
SAMPLE_COLUMNS = 4
"""Samples side by side in the video of all samples."""


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
        self.trackers = make_trackers(job, start)
        self.gauges: dict[str, Gauge] = {}
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
            if name not in self.gauges:
                self.gauges[name] = Gauge(f"ardiff_train_{re.sub('[^a-zA-Z0-9_]', '_', name)}", tag_keys=("run",))
            self.gauges[name].set(value, tags={"run": self.job.folder})
        for tracker in self.trackers:
            tracker.log(step, values)

    def on_samples(self, step: int, videos: Tensor) -> None:
        png, video = contact_sheet(videos.numpy()), tile(videos.numpy(), SAMPLE_COLUMNS)
        for tracker in self.trackers:
            tracker.log_samples(step, png, video)
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

    def prepare_flush(self) -> Callable[[], None]:
        """A function that stores what is logged by now, on rank 0. It may run in a thread, and raises DataError."""
        history = json.dumps(self.history).encode() if self.is_leader else b""

        def flush() -> None:
            if self.is_leader:
                for tracker in self.trackers:
                    tracker.flush()
                storage.write_bytes(self.job.history_file, history)

        return flush

    def close(self) -> None:
        """Ends the log of a finished run. Raises DataError."""
        if self.is_leader:
            self.prepare_flush()()
            for tracker in self.trackers:
                tracker.close()
