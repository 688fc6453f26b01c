"""Runs a :class:`TrainJob` on Ray Train, from the driver."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs as pafs
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from ardiff.data import storage
from ardiff.errors import ConfigError, TrainingError
from ardiff.train.config import TrainConfig
from ray_jobs.runtime.cluster import await_resource, resolve_device
from ray_jobs.runtime.progress import remote_progress
from ray_jobs.training.attempts import TrainingProgress
from ray_jobs.training.job import TrainJob
from ray_jobs.training.preemption import HandleSigterm
from ray_jobs.training.resume import prepare_resume
from ray_jobs.training.worker import summarize_error, train_worker

WORKER_LOST = "a worker process died without an error, which happens when the system kills it for lack of memory"


def run_training(job: TrainJob) -> dict[str, list[list[float]]]:
    """Trains to the end and resumes from the last checkpoint if there is one.

    Returns:
        The logged history: a list of ``[step, value]`` by name.

    Raises:
        ArdiffError: The reason why training stopped.
    """
    config, device = job.config, resolve_device(job.config.device)
    check_cluster_size(config, device)
    job = prepare_resume(job)
    # Ray Train restores the latest registered checkpoint of a run with the same name in the same storage.
    filesystem, path = storage.open_filesystem(job.folder, retry=True)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    with remote_progress(job.name, config.num_steps, "step", TrainingProgress) as progress:
        callbacks: list[Any] = [HandleSigterm()]
        if config.max_failures:
            callbacks.append(_ReportFailedAttempts(progress))
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job, "progress": progress},
            torch_config=TorchConfig(backend="nccl" if device.type == "cuda" else "gloo"),
            scaling_config=_scaling_config(config, device),
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
            with raise_on_sigint():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise explain_failure(error, job, ray.get(progress.last_failure.remote())) from error
    history: dict[str, list[list[float]]] = json.loads(storage.read_bytes(job.history_file))
    return history


class _ReportFailedAttempts(ray.train.UserCallback):
    """Reports every failed attempt to the progress actor. Ray Train's controller calls it."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train before it retries or gives up."""
        self.progress.end_attempt.remote(WORKER_LOST)


def explain_failure(error: ray.train.TrainingFailedError, job: TrainJob, last_failure: str) -> TrainingError:
    """The error for the user. ``last_failure`` is what a worker reported, empty if no worker did."""
    if isinstance(error, ray.train.ControllerError):
        return TrainingError(
            f"Ray Train failed although no worker failed: {summarize_error(error.controller_failure)}. Check that "
            f"{job.checkpoints}, where it keeps its list of checkpoints, is reachable and has space. The same command "
            "resumes from the last checkpoint."
        )
    times = f" {job.config.max_failures + 1} times" if job.config.max_failures > 0 else ""
    return TrainingError(
        f"Training failed{times}: {last_failure or WORKER_LOST}. The last checkpoint is good. Add --debug to the same "
        "command to see the workers' output."
    )


@contextlib.contextmanager
def raise_on_sigint() -> Iterator[None]:
    """Turns Ctrl-C into KeyboardInterrupt while ``fit`` runs, which would exit with code 0 and keep its own handler."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def check_cluster_size(config: TrainConfig, device: torch.device) -> None:
    """Raises ConfigError if the cluster is too small for the workers and does not grow: Ray Train would wait
    forever."""
    setting = "min_workers" if config.min_workers else "num_workers"
    count = config.min_workers or config.num_workers
    gpus: dict[Literal["CPU", "GPU"], int] = {"GPU": count} if device.type == "cuda" else {}
    for kind, needed in {**gpus, "CPU": count * config.cpu_threads + 1}.items():
        if (available := await_resource(kind, needed)) < needed:
            details = f" (train.cpu_threads={config.cpu_threads} each, and one to load data)" if kind == "CPU" else ""
            raise ConfigError(
                f"train.{setting}={count} needs {needed} {kind}s{details}, but the Ray cluster has {available}: lower "
                "it or add nodes."
            )


def _scaling_config(config: TrainConfig, device: torch.device) -> ray.train.ScalingConfig:
    gpu = device.type == "cuda"
    settings: dict[str, Any] = {  # Ray Train's annotations lack the elastic range and its interval
        "num_workers": (config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
        "elastic_resize_monitor_interval_s": config.resize_interval,
        "use_gpu": gpu,
        "resources_per_worker": {"CPU": config.cpu_threads, **({"GPU": 1} if gpu else {})},
    }
    return ray.train.ScalingConfig(**settings)
