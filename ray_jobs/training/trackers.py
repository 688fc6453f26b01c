"""Trackers of training runs: TensorBoard, Weights & Biases and MLflow, behind one interface."""

import importlib
import io
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ardiff.config import fingerprint
from ardiff.data import storage
from ardiff.data.encode import encode_video, to_gif
from ardiff.errors import ConfigError
from ray_jobs.training.job import TrainJob

logger = logging.getLogger(__name__)
FPS = 8
"""Frames per second of sample videos."""


class Tracker(Protocol):
    """Where rank 0 of a training run logs. A restart continues the same run of the tracker."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs values by name."""

    def log_samples(self, step: int, sheet: bytes, video: np.ndarray) -> None:
        """Logs samples: their sheet, a PNG, and one video of all, uint8 ``(F, H, W, 3)``."""

    def flush(self) -> None:
        """Makes everything logged so far durable. Raises DataError."""

    def close(self) -> None:
        """Ends a finished run. Raises DataError."""


def make_trackers(job: TrainJob, start: int) -> list[Tracker]:
    """The trackers of ``train.trackers``, from step ``start`` on. Raises ConfigError if a package is missing."""
    trackers: list[Tracker] = []
    for name in job.config.trackers:
        match name:
            case "tensorboard":
                trackers.append(TensorBoardTracker(job, start))
            case "wandb":
                trackers.append(WandbTracker(job))
            case "mlflow":
                trackers.append(MLflowTracker(job))
    return trackers


class TensorBoardTracker:
    """Event files in ``tensorboard`` of the run's folder.

    TensorBoard appends to its files, which S3 cannot do: they are uploaded from a local folder.
    """

    def __init__(self, job: TrainJob, start: int) -> None:
        self.target, self.local = storage.join(job.folder, "tensorboard"), tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.local.name, purge_step=start + 1 if start else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, step: int, sheet: bytes, video: np.ndarray) -> None:
        self.writer.add_image("samples", np.asarray(Image.open(io.BytesIO(sheet))), step, dataformats="HWC")
        # As `add_video` does, but without its package: TensorBoard plays a GIF that is an image.
        image = Summary.Image(
            height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=to_gif(video, FPS)
        )
        summary = Summary(value=[Summary.Value(tag="sample_videos", image=image)])
        self.writer._get_file_writer().add_summary(summary, step)

    def flush(self) -> None:
        self.writer.flush()
        storage.upload_folder(Path(self.local.name), self.target)

    def close(self) -> None:
        self.writer.close()
        self.local.cleanup()


class WandbTracker:
    """A run of Weights & Biases in the project ``train.project``. With WANDB_MODE=offline its files are written to
    ``wandb`` of the run's folder, if that is local."""

    def __init__(self, job: TrainJob) -> None:
        self.wandb = _package("wandb")
        folder = None if storage.is_remote(job.folder) else job.folder
        self.run = self.wandb.init(
            project=job.config.project, id=_run_id(job), name=job.folder, dir=folder, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def log_samples(self, step: int, sheet: bytes, video: np.ndarray) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.mp4"
            file.write_bytes(encode_video(video, FPS))
            image = self.wandb.Image(Image.open(io.BytesIO(sheet)))
            self.run.log({"samples": image, "sample_videos": self.wandb.Video(str(file), format="mp4")}, step=step)

    def flush(self) -> None:
        """Weights & Biases writes by itself."""

    def close(self) -> None:
        self.run.finish()


class MLflowTracker:
    """A run of MLflow in the experiment ``train.project``, at MLFLOW_TRACKING_URI or in ``mlruns`` of the run's folder.

    Values are lost if the server fails during training. If it fails at the start, the run stops.
    """

    def __init__(self, job: TrainJob) -> None:
        mlflow = _package("mlflow")
        self.error = _package("mlflow.exceptions").MlflowException
        self.metric = _package("mlflow.entities").Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri and storage.is_remote(job.folder):
            raise ConfigError(f"train.trackers=[mlflow] needs MLFLOW_TRACKING_URI, because {job.folder} is not local.")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow prefers databases, which a run needs not
        self.client = mlflow.MlflowClient(uri or (Path(job.folder).absolute() / "mlruns").as_uri())
        experiment = self.client.get_experiment_by_name(job.config.project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(job.config.project)
        key = _run_id(job)
        runs = self.client.search_runs([experiment_id], f"tags.ardiff_run = '{key}'", max_results=1)
        run = runs[0] if runs else self.client.create_run(experiment_id, tags={"ardiff_run": key}, run_name=job.folder)
        self.run_id = run.info.run_id
        self.client.update_run(self.run_id, status="RUNNING")

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(re.sub(r"[^\w./ -]", "_", n), value, now, step) for n, value in values.items()]
        self._try(lambda: self.client.log_batch(self.run_id, metrics=metrics))

    def log_samples(self, step: int, sheet: bytes, video: np.ndarray) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for suffix, content in (("png", sheet), ("mp4", encode_video(video, FPS))):
                (Path(folder) / f"step-{step:06d}.{suffix}").write_bytes(content)
            self._try(lambda: self.client.log_artifacts(self.run_id, folder, "samples"))

    def flush(self) -> None:
        """Each call has stored its values."""

    def close(self) -> None:
        self._try(lambda: self.client.set_terminated(self.run_id))

    def _try(self, call: Any) -> None:
        try:
            call()
        except self.error as error:
            logger.warning("MLflow did not store values: %s", error)


def _run_id(job: TrainJob) -> str:
    """The same for every attempt of a run."""
    return fingerprint(job.folder, job.fingerprint)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"train.trackers names {package}, which is not installed: pip install 'ardiff[trackers]'."
        ) from error
