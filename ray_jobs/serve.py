"""The endpoint on Ray Serve: replicas that own the packed engine and answer HTTP themselves.

    ardiff serve --checkpoint runs/quickstart/dit/pipeline     # on this machine, http://127.0.0.1:8000
    serve deploy cluster/serve_config.yaml                     # on a cluster

A replica is ingress and engine in one: an interface in front of it would leave it generating when it dies.

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
from ardiff.serving.service import GIVING_BACK, VideoService
from ray_jobs.runtime.cluster import ray_cluster, resolve_device
from ray_jobs.runtime.console import print_line

APP = "ardiff"
DEPLOYMENT = "VideoServer"
MAX_REQUESTS = 512  # requests at a replica, and those on their way to one


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """What a replica loads and how it serves; the ``args`` of a Serve configuration."""

    checkpoint: str | None = None
    """Folder of a trained pipeline, local or s3://; served under the name ``default``."""
    models: dict[str, str] = field(default_factory=dict)
    """Further pipelines by name, as ``models.NAME=PLACE``; the first is served where a request names none."""
    cpu_threads: int = 2
    """Threads of a replica on CPUs, which is also the CPUs it asks Ray for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU a replica if the cluster has some."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights, and of the arithmetic in the models."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """Queue, limits, storage, keys."""

    def __post_init__(self) -> None:
        if self.cpu_threads < 1:
            raise ValueError("cpu_threads must be at least 1")
        if not all(isinstance(place, str) for place in self.models.values()):
            raise ValueError("models maps names to places")

    @property
    def places(self) -> dict[str, str]:
        """All pipelines by name."""
        return ({"default": self.checkpoint} if self.checkpoint else {}) | self.models


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(ReplicaConfig):
    """A service on this machine, or on the cluster that RAY_ADDRESS names."""

    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs ``service.keys``."""
    port: int = 8000
    """Port to listen on."""
    min_replicas: int = 1
    """Replicas at least."""
    max_replicas: int = 1
    """Replicas at most."""
    jobs_per_replica: float = 8.0
    """Jobs, waiting or in work, for which there is to be one replica. Keep it below ``service.engine.max_requests``:
    streams do not wait, so of those that find no place nothing is seen."""
    upscale_delay_s: float = 5.0
    """Seconds that more replicas must be needed before they are started."""
    downscale_delay_s: float = 60.0
    """Seconds that fewer replicas must be enough before some are stopped."""

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
                f"host {self.host} can be reached by others: give service.keys, or service.allow_anonymous=true"
            )

    @property
    def replica(self) -> ReplicaConfig:
        """The part that replicas see."""
        absolute = storage.absolute
        service = replace(
            self.service,
            storage=absolute(self.service.storage),
            keys=self.service.keys and absolute(self.service.keys),
        )
        models = {name: absolute(place) for name, place in self.models.items()}
        seen = replace(self, checkpoint=self.checkpoint and absolute(self.checkpoint), models=models, service=service)
        return ReplicaConfig(**{f.name: getattr(seen, f.name) for f in fields(ReplicaConfig)})


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
    """A replica."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        settings = build(ReplicaConfig, config)
        torch.set_num_threads(settings.cpu_threads)
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        pipelines = {
            name: ARDiffusionPipeline.from_pretrained(place, device, dtype) for name, place in settings.places.items()
        }
        # The service tries again by itself, and tells its clients at once that storage is away.
        s3.configure(replace(s3.current(), retry_seconds=0.0, timeout=min(s3.current().timeout, 10.0)))
        self.recorder = PrometheusRecorder()
        context = serve.get_replica_context()
        logs.start_run("serve", context.app_name)
        logs.set_context(replica=context.replica_tag)
        recorders = Recorders(self.recorder, RayRecorder())
        self.service = VideoService(pipelines, settings.service, recorders, context.replica_tag, _told_to_stop)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.service, self.recorder)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose check fails."""
        if not self.service.healthy:
            raise RuntimeError("a loop of the service has ended: see the replica's log")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :func:`ray_jobs.serving.autoscaling.replicas_for_jobs` reads."""
        return {"working": float(self.service.load), "waiting": float(self.service.waiting)}


def _told_to_stop() -> bool:
    """Whether Serve is stopping this replica.

    Serve 2.60 has no hook for it: it waits for the connections first, and the application hears of it after that.
    """
    worker = ray._private.worker.global_worker
    return bool(worker.actors[worker.actor_id]._replica_impl._shutting_down)


class RayRecorder:
    """Keeps the service's figures with Ray's own, which every node exports for Prometheus."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        for m in MEASURES:
            tags: Any = m.tags
            match m.kind:
                case "counter":
                    self._kept[m.name] = ray_metrics.Counter(m.name, m.description, tags)
                case "gauge":
                    self._kept[m.name] = ray_metrics.Gauge(m.name, m.description, tags)
                case "histogram":
                    self._kept[m.name] = ray_metrics.Histogram(m.name, m.description, list(m.buckets), tags)

    def record(self, name: str, value: float, **tags: str) -> None:
        kept = self._kept[name]
        match kept:
            case ray_metrics.Counter():
                if value > 0:
                    kept.inc(value, tags)
            case ray_metrics.Gauge():
                kept.set(value, tags)
            case ray_metrics.Histogram():
                kept.observe(value, tags)


def application(args: dict[str, Any]) -> serve.Application:
    """What ``import_path: ray_jobs.serve:application`` of a Serve configuration makes; ``args`` is a ReplicaConfig."""
    return _application(build(ReplicaConfig, args), {})


def grace(config: ServiceConfig) -> float:
    """Seconds that a replica may take to stop: to drain, to give jobs back, and Serve's own steps."""
    return config.drain_seconds + GIVING_BACK + 10


def _application(config: ReplicaConfig, options: dict[str, Any]) -> serve.Application:
    _check_places(config)
    # Serve waits for GPUs by itself, as long as it takes.
    device = config.device if config.device != "auto" else resolve_device("auto").type
    deployment: Deployment = VideoServer  # type: ignore[assignment]
    return deployment.options(
        ray_actor_options={"num_cpus": config.cpu_threads, "num_gpus": 1 if device == "cuda" else 0},
        graceful_shutdown_timeout_s=grace(config.service),
        **options,
    ).bind(to_dict(config), device)


def _check_places(config: ReplicaConfig) -> None:
    """Raises ArdiffError for what every replica would stumble over."""
    if not config.places:
        raise ConfigError("There is no model to serve: give --checkpoint PLACE, or models.NAME=PLACE.")
    for place in config.places.values():
        if not storage.exists(storage.join(place, CONFIG)):
            raise CheckpointError(f"There is no trained model in {place}: it should hold {CONFIG}.")
    if config.service.keys:
        read_keys(config.service.keys)


def run(config: ServeConfig) -> None:
    """Serves until it is interrupted, then lets the jobs in work finish. Raises ArdiffError before Ray is started."""
    _check_places(config.replica)
    _check_port(config.host, config.port)
    # Serve's controller is to hear of the load often enough to act on it.
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    with _stopping() as stop, ray_cluster(config.max_replicas * config.cpu_threads + 1):
        resolve_device(config.device)
        if others := serve.status().applications:
            raise ConfigError(
                f"The cluster serves {', '.join(others)} already, which this would end: change that with "
                "`serve deploy`, as cluster/README.md says, or unset RAY_ADDRESS."
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        encoding = LoggingConfig(encoding="JSON") if logs.is_json() else None
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port), logging_config=encoding)
        try:
            serve.run(_application(config.replica, {"autoscaling_config": _scaling(config)}), name=APP)
        except RuntimeError as error:
            raise ArdiffError(f"The replicas do not start: {error} --debug shows their output.") from error
        print_line(
            f"Serving {', '.join(config.replica.places)} at http://{config.host}:{config.port} (the page is at /)."
        )
        print_line(f"Records and videos: {config.replica.service.storage}. Ctrl-C drains and stops.")
        stop.wait()
        print_line(
            f"Draining for at most {config.service.drain_seconds:g} s; what is left then goes back to the queue."
        )
        _drain(grace(config.service) + 5)


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
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the second signal does what it usually does."""
    stop = threading.Event()
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def heard(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in usual:
        signal.signal(number, heard)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Give another --port or --host."
        ) from error


def _is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
