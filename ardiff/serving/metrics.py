"""The metrics of the service, and recorders that export them: prometheus_client here, Ray's metrics in ray_jobs."""

from dataclasses import dataclass
from typing import Literal, Protocol

import prometheus_client

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = _SECONDS


MEASURES = (
    Measure("ardiff_jobs_waiting", "gauge", "Queued jobs of all replicas."),
    Measure("ardiff_jobs_running", "gauge", "Running jobs of this replica."),
    Measure("ardiff_jobs_ended", "counter", "Jobs that ended.", ("status",)),
    Measure("ardiff_frames", "counter", "Frames sent.", ("model",)),
    Measure("ardiff_frame_evaluations", "counter", "Frames that the model evaluated.", ("model",)),
    Measure("ardiff_iterations", "counter", "Batched passes of the model.", ("model",)),
    Measure("ardiff_iteration_seconds", "histogram", "Time of a batched pass with decoding and encoding.", ("model",)),
    Measure("ardiff_frames_per_second", "gauge", "Frames sent per second, over the last ten seconds.", ("model",)),
    Measure("ardiff_first_frame_seconds", "histogram", "From a job's creation to its first frame.", ("model",)),
    Measure("ardiff_job_seconds", "histogram", "From a job's creation to its completion.", ("model",)),
    Measure("ardiff_errors", "counter", "Failed jobs and rejected requests.", ("kind",)),
    Measure("ardiff_database_up", "gauge", "1 if the last call of the database succeeded."),
    Measure("ardiff_storage_up", "gauge", "1 if the last call of shared storage succeeded."),
)


class Recorder(Protocol):
    """Records metrics."""

    def record(self, name: str, value: float, **tags: str) -> None:
        """Adds ``value`` to a counter, sets a gauge to it, or adds it to a histogram."""


class PrometheusRecorder:
    """Records the metrics in this process, for ``/metrics``."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._metrics: dict[str, prometheus_client.Counter | prometheus_client.Gauge | prometheus_client.Histogram] = {}
        for m in MEASURES:
            match m.kind:
                case "counter":
                    self._metrics[m.name] = prometheus_client.Counter(
                        m.name, m.description, m.tags, registry=self.registry
                    )
                case "gauge":
                    self._metrics[m.name] = prometheus_client.Gauge(
                        m.name, m.description, m.tags, registry=self.registry
                    )
                case "histogram":
                    self._metrics[m.name] = prometheus_client.Histogram(
                        m.name, m.description, m.tags, registry=self.registry, buckets=m.buckets
                    )

    def record(self, name: str, value: float, **tags: str) -> None:
        metric = self._metrics[name]
        metric = metric.labels(**tags) if tags else metric
        match metric:
            case prometheus_client.Counter():
                metric.inc(value)
            case prometheus_client.Gauge():
                metric.set(value)
            case prometheus_client.Histogram():
                metric.observe(value)

    def text(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return prometheus_client.generate_latest(self.registry)


class Recorders:
    """Records each metric with several recorders."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def record(self, name: str, value: float, **tags: str) -> None:
        for recorder in self._recorders:
            recorder.record(name, value, **tags)
