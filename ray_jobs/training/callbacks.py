"""What a training worker tells while it trains: progress, figures, sheets and checkpoints."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import ray.train
from PIL import Image
from ray.util.metrics import Gauge
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ardiff import distributed, logs
from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import contact_sheet
from ardiff.errors import ConfigError, DataError, TrainingError
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState, write_state, write_tensors
from ardiff.train.engines.base import Engine
from ardiff.train.export import MODEL

if TYPE_CHECKING:
    from ray_jobs.training.job import TrainJob

logger = logging.getLogger(__name__)
HISTORY = "history.json"
BEST = "best/best.json"


class Observer(TrainingCallback):
    """Tells the driver's progress bar, TensorBoard, Ray's metrics and the run's folder what happens.

    Every worker has one; it is the first worker's that talks, and all of them store checkpoints together.
    """

    def __init__(
        self, job: TrainJob, engine: Engine, discriminator: Engine | None, start: int, progress_actor: Any
    ) -> None:
        self.job, self.engine, self.discriminator, self.progress_actor = job, engine, discriminator, progress_actor
        self.leads = distributed.rank() == 0
        self.losses: list[float] = []
        self.failed_saves = 0
        # Checkpoints of different attempts must not mix, and all workers have to agree on their names.
        [token] = distributed.sum_over([secrets.randbits(32) if self.leads else 0.0], engine.device)
        self.token = f"{int(token):08x}"
        logs.set_context(step=start)
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
        progress_actor.begin_attempt.remote()
        progress_actor.set.remote(start)
        team = f"with {distributed.size()} of {job.config.num_workers} workers" if job.config.min_workers else ""
        if start or team:
            beginning = f"going on from the checkpoint of step {start}" if start else "starting"
            progress_actor.log.remote(f"{job.name}: {beginning} {team}".rstrip())

    def on_step_end(self, step: int, loss: float) -> None:
        logs.set_context(step=step)
        self.losses.append(loss)
        now = os.times().elapsed
        if self.leads and (now >= self.next_tick or step == self.job.config.num_steps):
            self.next_tick = now + 0.5
            self.progress_actor.set.remote(step, f"loss {loss:.4f}")

    def on_log(self, step: int, values: dict[str, float]) -> None:
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

    def on_samples(self, step: int, videos: Tensor) -> None:
        png = contact_sheet(videos.numpy())
        self.writer.add_image("samples", np.asarray(Image.open(io.BytesIO(png))), step, dataformats="HWC")
        try:
            storage.write_bytes(storage.join(self.job.folder, "samples", f"step-{step:06d}.png"), png)
        except DataError as error:
            self.progress_actor.log.remote(f"{self.job.name}: the samples of step {step} were not stored: {error}")

    def on_trace(self, content: bytes) -> None:
        """Stores a worker's trace; one that cannot be stored is not worth the run."""
        name = f"{self.token}-worker-{distributed.rank()}.json.gz"
        try:
            storage.write_bytes(storage.join(self.job.folder, "profile", name), content)
        except DataError as error:
            self.progress_actor.log.remote(f"{self.job.name}: the trace was not stored: {error}")

    def on_checkpoint(self, state: TrainState) -> None:
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
            filesystem, path = storage.open_filesystem(place, retry=True)
            ray.train.report(
                {"step": state.step, "loss": loss},
                checkpoint=ray.train.Checkpoint(path, filesystem),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            )
            if self._is_best(loss):
                best = storage.join(self.job.folder, "best", f"step-{state.step:08d}-{self.token}")
                failure = self._store(Path(folder), best, state) or self._point_to_best(state.step, loss, best)
        if failure and self.leads:
            self.progress_actor.log.remote(
                f"{self.job.name}: step {state.step} is the best one, but could not be kept as such: {failure}"
            )

    def _write(self, folder: Path) -> None:
        write_tensors(folder, self.engine, self.discriminator)
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
        [failures] = distributed.sum_over([float(bool(failure))], self.engine.device)
        return failure or (f"{int(failures)} of {distributed.size()} workers could not write." if failures else "")

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
            self.progress_actor.log.remote(
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
        return bool(distributed.sum_over([float(better)], self.engine.device)[0])

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
