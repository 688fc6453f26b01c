"""The endpoint on Ray Serve.

    ardiff serve --checkpoint runs/quickstart/dit/pipeline     # on this machine, http://127.0.0.1:8000
    serve deploy cluster/overlays/aws/serve_config.yaml        # on a cluster

A replica is both ingress and engine. If the ingress were separate and crashed, the engine would continue to generate
videos without a reader.

This module must not postpone the evaluation of annotations, see :mod:`ardiff.serving.api`.
"""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from types import FrameType
from typing import Any, Literal

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Deployment
from ray.serve import metrics as ray_metrics
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from ardiff import logs
from ardiff.cli import main
from ardiff.config import build, to_dict
from ardiff.data import s3, storage
from ardiff.errors import ArdiffError, CheckpointError, ConfigError
from ardiff.pipeline import ARDiffusionPipeline
from ardiff.pretrained import CONFIG
from ardiff.serving.api import build_app
from ardiff.serving.config import ServiceConfig
from ardiff.serving.keys import read_keys
from ardiff.serving.metrics import MEASURES, PrometheusRecorder, Recorders
from ardiff.serving.replica import RELEASE_SECONDS, Replica
from ray_jobs.runtime.cluster import ray_cluster, resolve_device
from ray_jobs.runtime.console import print_line

APP = "ardiff"
DEPLOYMENT = "VideoServer"
MAX_REQUESTS = 512
"""Open requests of a replica, and requests that wait for one in Serve's proxy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """Models and settings of a replica: the ``args`` of a Serve configuration."""

    checkpoint: str | None = None
    """Folder of a trained pipeline, local or s3://. It is served under the name ``default``."""
    models: dict[str, str] = field(default_factory=dict)
    """Further pipelines by name, as ``models.NAME=URI``. Requests without a model use the first one."""
    cpu_threads: int = 2
    """CPU threads of a replica, and the CPUs that it requests from Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` gives each replica a GPU if the cluster has any."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of the weights and activations."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """Queue, limits, storage and keys."""

    def __post_init__(self) -> None:
        if self.cpu_threads < 1:
            raise ValueError("cpu_threads must be at least 1")
        if not all(isinstance(uri, str) for uri in self.models.values()):
            raise ValueError("models must map names to URIs")

    @property
    def uris(self) -> dict[str, str]:
        """All pipelines by name."""
        return ({"default": self.checkpoint} if self.checkpoint else {}) | self.models


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(ReplicaConfig):
    """A service on this machine, or on the cluster at RAY_ADDRESS."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs ``service.keys``."""
    port: int = 8000
    """Port to listen on."""
    min_replicas: int = 1
    """Smallest number of replicas."""
    max_replicas: int = 1
    """Largest number of replicas."""
    jobs_per_replica: float = 8.0
    """Queued and running jobs per replica at which the service scales. Keep it below ``service.engine.max_requests``:
    streams do not wait, so rejected ones do not count as load."""
    upscale_delay_s: float = 5.0
    """Seconds of higher load before replicas are added."""
    downscale_delay_s: float = 60.0
    """Seconds of lower load before replicas are stopped."""

    def __post_init__(self) -> None:
        ReplicaConfig.__post_init__(self)
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError("min_replicas must be at least 1, max_replicas at least min_replicas")
        if self.jobs_per_replica <= 0 or min(self.upscale_delay_s, self.downscale_delay_s) < 0:
            raise ValueError("jobs_per_replica must be positive, delays not negative")
        if not 1 <= self.port <= 65535:
            raise ValueError("port must be in 1..65535")
        if not (_is_local(self.host) or self.service.keys or self.service.allow_anonymous):
            raise ValueError(
                f"other machines can reach host {self.host}: set service.keys, or service.allow_anonymous=true"
            )

    @property
    def replica(self) -> ReplicaConfig:
        """The part for the replicas, with absolute paths."""
        absolute = storage.absolute
        service = replace(
            self.service,
            storage=absolute(self.service.storage),
            database=self.service.database and absolute(self.service.database),
            database_password=_absolute_reference(self.service.database_password),
            keys=self.service.keys and absolute(self.service.keys),
        )
        models = {name: absolute(uri) for name, uri in self.models.items()}
        config = replace(self, checkpoint=self.checkpoint and absolute(self.checkpoint), models=models, service=service)
        return ReplicaConfig(**{f.name: getattr(config, f.name) for f in fields(ReplicaConfig)})


def _absolute_reference(password: str | None) -> str | None:
    """A reference to a password, with the absolute path of its file."""
    return password if password is None or password.startswith("env:") else storage.absolute(password)


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=MAX_REQUESTS,
    max_queued_requests=MAX_REQUESTS,
    backpressure_config=BackpressureConfig(retry_after_s=5),
    health_check_period_s=5,
    health_check_timeout_s=30,
)
@serve.ingress()
class VideoServer:
    """A replica of the service."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        settings = build(ReplicaConfig, config)
        torch.set_num_threads(settings.cpu_threads)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        pipelines = {
            name: ARDiffusionPipeline.from_pretrained(uri, device, dtype) for name, uri in settings.uris.items()
        }
        # The service retries by itself, and its clients get an error at once if storage is unavailable.
        s3.configure(replace(s3.current(), retry_seconds=0.0, timeout=min(s3.current().timeout, 10.0)))
        self.recorder = PrometheusRecorder()
        context = serve.get_replica_context()
        logs.start_run("serve", context.app_name)
        logs.set_context(replica=context.replica_tag)
        recorders = Recorders(self.recorder, RayRecorder())
        self.replica = Replica(pipelines, settings.service, recorders, context.replica_tag, _stop_requested)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.replica, self.recorder)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that is not healthy."""
        if not self.replica.healthy:
            raise RuntimeError("a loop of the replica has ended: see its log")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Metrics for :func:`ray_jobs.serving.autoscaling.replicas_for_jobs`."""
        return {"running": float(len(self.replica.running)), "waiting": float(self.replica.queue.waiting)}


def _stop_requested() -> bool:
    """Whether Serve stops this replica.

    Serve 2.60 has no hook for this: it calls the application's shutdown only after all connections are closed.
    """
    worker = ray._private.worker.global_worker
    return bool(worker.actors[worker.actor_id]._replica_impl._shutting_down)


class RayRecorder:
    """Records the service's metrics as Ray metrics, which every node exports for Prometheus."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        for m in MEASURES:
            tags: Any = m.tags
            match m.kind:
                case "counter":
                    self._metrics[m.name] = ray_metrics.Counter(m.name, m.description, tags)
                case "gauge":
                    self._metrics[m.name] = ray_metrics.Gauge(m.name, m.description, tags)
                case "histogram":
                    self._metrics[m.name] = ray_metrics.Histogram(m.name, m.description, list(m.buckets), tags)

    def record(self, name: str, value: float, **tags: str) -> None:
        metric = self._metrics[name]
        match metric:
            case ray_metrics.Counter():
                if value > 0:
                    metric.inc(value, tags)
            case ray_metrics.Gauge():
                metric.set(value, tags)
            case ray_metrics.Histogram():
                metric.observe(value, tags)


def application(args: dict[str, Any]) -> serve.Application:
    """The application for ``import_path: ray_jobs.serve:application``; ``args`` are the fields of ReplicaConfig."""
    return _application(build(ReplicaConfig, args), {})


def shutdown_seconds(config: ServiceConfig) -> float:
    """Seconds that a replica may take to stop: draining, returning jobs to the queue, and Serve's own steps."""
    return config.drain_seconds + RELEASE_SECONDS + 10


def _application(config: ReplicaConfig, options: dict[str, Any]) -> serve.Application:
    _check_models(config)
    # Serve itself waits for GPUs, for as long as it takes.
    device = config.device if config.device != "auto" else resolve_device("auto").type
    deployment: Deployment = VideoServer  # type: ignore[assignment]
    return deployment.options(
        ray_actor_options={"num_cpus": config.cpu_threads, "num_gpus": 1 if device == "cuda" else 0},
        graceful_shutdown_timeout_s=shutdown_seconds(config.service),
        **options,
    ).bind(to_dict(config), device)


def _check_models(config: ReplicaConfig) -> None:
    """Raises ArdiffError if there is no model, or one of them or the key file cannot be read."""
    if not config.uris:
        raise ConfigError("There is no model to serve: give --checkpoint URI, or models.NAME=URI.")
    for uri in config.uris.values():
        if not storage.exists(storage.join(uri, CONFIG)):
            raise CheckpointError(f"There is no trained model in {uri}: {CONFIG} is missing.")
    if config.service.keys:
        read_keys(config.service.keys)


def run(config: ServeConfig) -> None:
    """Serves until it is interrupted, then drains. Raises ArdiffError before Ray starts if the settings are wrong."""
    _check_models(config.replica)
    _check_port(config.host, config.port)
    # Replicas report their load often enough for the delays of autoscaling.
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    with _interruption() as interrupted, ray_cluster(config.max_replicas * config.cpu_threads + 1):
        resolve_device(config.device)
        if others := serve.status().applications:
            raise ConfigError(
                f"The cluster already serves {', '.join(others)}, and this command would stop it: use `serve deploy` "
                "as in cluster/README.md, or unset RAY_ADDRESS."
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        encoding = LoggingConfig(encoding="JSON") if logs.is_json() else None
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port), logging_config=encoding)
        try:
            serve.run(_application(config.replica, {"autoscaling_config": _scaling(config)}), name=APP)
        except RuntimeError as error:
            raise ArdiffError(f"The replicas did not start: {error} --debug shows their output.") from error
        print_line(f"Serving {', '.join(config.replica.uris)} at http://{config.host}:{config.port} (web page at /).")
        service = config.replica.service
        print_line(f"Jobs: {service.database_uri}. Videos: {service.storage}. Ctrl-C drains and stops.")
        interrupted.wait()
        print_line(
            f"Draining for at most {config.service.drain_seconds:g} s. Unfinished jobs then return to the queue."
        )
        _drain(shutdown_seconds(config.service) + 5)


def _scaling(config: ServeConfig) -> dict[str, Any]:
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.jobs_per_replica,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 2.0,
        "policy": {"policy_function": "ray_jobs.serving.autoscaling:replicas_for_jobs"},
    }


def _drain(seconds: float) -> None:
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + seconds
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
    serve.shutdown()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal interrupts the process."""
    interrupted = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host."
        ) from error


def _is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
